"""Runs timm's own tests/test_models.py, which is no part of this repository, on our 2-D names.

    python tests/backbones/timm_checks.py .../timm-1.0.31/tests/test_models.py -n 8

Take the file of the release of timm that is installed (its source archive on PyPI has it). timm's own models are left
out, and what timm_deselected.toml lists. Whatever follows the file goes to pytest: `-k va_nat_mini` takes one model.
"""

import fnmatch
import sys
import tomllib
from pathlib import Path

import pytest
import timm

import visattn
from visattn.backbones import FAMILIES

assert visattn.__version__
LISTED = Path(__file__).with_name("timm_deselected.toml")
QUIET = ("-q", "-rf", "--tb=short", "--no-header", "--disable-warnings", "-c", "/dev/null", "-p", "no:cacheprovider")
_list_models = timm.list_models


def images(name: str) -> bool:
    """Whether timm's tests can make an input for the model: they know images only."""
    return timm.get_pretrained_cfg_value(name, "input_size") is not None


def tokens(name: str) -> bool:
    """Whether the model's features are tokens; timm's tests know its own such models by their names."""
    return timm.get_pretrained_cfg_value(name, "pool_size") is None


def ours(filter="", module="", **kwargs):  # noqa: A002, the name is timm's
    """`timm.list_models` of our names; families in files of ours stand in no list of timm's modules."""
    if kwargs.pop("pretrained", False):
        return []
    if "deit*" in filter:  # names of models with features of their own form
        return [name for name in ours(**{**kwargs, "exclude_filters": ""}) if tokens(name)]
    return [name for name in _list_models(filter, **kwargs) if name.split(".")[0] in FAMILIES and images(name)]


def reason(check: str, model: str) -> str | None:
    """Why `check` is left out for `model`, if it is."""
    for entry in tomllib.loads(LISTED.read_text())["deselected"]:
        if check in entry["checks"] and any(fnmatch.fnmatch(model, pattern) for pattern in entry["models"]):
            return entry["reason"]
    return None


def pytest_configure(config):
    timm.list_models = ours
    timm.list_pretrained = lambda *_args, **_kwargs: []
    sys.modules["timm.models"].list_models = ours


def pytest_collection_modifyitems(config, items):
    kept, left = [], []
    for item in items:
        model = getattr(item, "callspec", None) and item.callspec.params.get("model_name")
        listed = model and model in FAMILIES and reason(item.originalname, model) is None
        (kept if listed else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


if __name__ == "__main__":
    sys.exit(pytest.main([*QUIET, "-p", "timm_checks", *sys.argv[1:]]))
