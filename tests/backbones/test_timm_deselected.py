"""The list of timm's checks that our models are not put to: entries name registered models, checks and a reason."""

import fnmatch
import tomllib
from pathlib import Path

import visattn
from visattn.backbones import FAMILIES

assert visattn.__version__
ENTRIES = tomllib.loads(Path(__file__).with_name("timm_deselected.toml").read_text())["deselected"]
# The checks of timm 1.0.31's tests/test_models.py that run once for each model.
CHECKS = {
    "test_model_backward",
    "test_model_backward_fx",
    "test_model_default_cfgs",
    "test_model_default_cfgs_non_std",
    "test_model_forward",
    "test_model_forward_features",
    "test_model_forward_fx",
    "test_model_forward_fx_torchscript",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_model_forward_torchscript",
    "test_prune_intermediate_layers_contract",
}


def test_entries_name_models_checks_and_a_reason():
    assert ENTRIES
    for entry in ENTRIES:
        assert set(entry) == {"checks", "models", "reason"}
        assert entry["checks"]
        assert set(entry["checks"]) <= CHECKS
        assert len(entry["reason"]) > 20
        assert entry["models"]
        for pattern in entry["models"]:
            assert fnmatch.filter(FAMILIES, pattern), f"{pattern} names no registered model"


def test_nothing_is_listed_twice():
    pairs = [(check, model) for each in ENTRIES for check in each["checks"] for model in each["models"]]
    assert len(pairs) == len(set(pairs))
