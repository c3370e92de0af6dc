import importlib.util
import sys
from pathlib import Path

import pytest

import visattn.networks

_spec = importlib.util.spec_from_file_location("predict_fakes", Path(__file__).parent / "fakes.py")
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)
sys.modules["predict_fakes"] = fakes  # the one copy that the tests of this folder import


@pytest.fixture(autouse=True)
def bright_network(monkeypatch):
    monkeypatch.setattr(visattn.networks, "create_model", fakes.create_model)


@pytest.fixture
def checkpoint(tmp_path):
    return fakes.write_checkpoint(tmp_path / "best.ckpt")
