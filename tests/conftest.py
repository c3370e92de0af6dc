import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

TESTS = Path(__file__).resolve().parent


def load(path: Path) -> ModuleType:
    """The module in the file `path`; tests are no package, so they cannot import each other."""
    spec = importlib.util.spec_from_file_location(f"visattn_tests_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test-all` asks for every test; those for a GPU are skipped where there is none."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real labelled images named by VISATTN_REAL_DATA; the test is skipped without it."""
    folder = os.environ.get("VISATTN_REAL_DATA")
    if not folder:
        pytest.skip("VISATTN_REAL_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def polyps(tmp_path_factory) -> Path:
    """A folder with images/ and masks/ of 12 small synthetic cases."""
    from visattn.data.phantom import write_phantom

    folder = tmp_path_factory.mktemp("polyps")
    write_phantom(folder, 12, seed=5, size=(64, 80))
    return folder


@pytest.fixture(scope="session")
def golden():
    """`golden(system, variant)` opens the golden case of that name."""
    return load(TESTS / "golden_cases.py").Golden


@pytest.fixture(scope="session")
def reference():
    """`reference(name)` is the module tests/reference/<name>.py."""
    return lambda name: load(TESTS / "reference" / f"{name}.py")
