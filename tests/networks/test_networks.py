"""What every network of the table promises."""

import inspect
import subprocess
import sys

import pytest
import torch

from visattn.errors import UserError
from visattn.networks import NETWORKS, check_network, create_model, describe, prediction

PYRAMID = {
    "backbone": "va_pyramid",
    "backbone_args": {"widths": (8, 12, 16), "depths": (1, 1, 1), "strides": (4, 2, 2)},
}
# A small setting of each network, so that a new one is tested by one line.
SMALL = {
    "agunet": {"filters": (4, 6, 8)},
    "att_swin_unet": {"img_size": 32},
    "daunet": {"filters": (4, 6, 8)},
    "fpn": {**PYRAMID, "width": 16, "branch_width": 8},
    "linear": PYRAMID,
    "pranet": {"backbone": "resnet10t", "channels": 8},
    "unet": {**PYRAMID, "deep_supervision": True},
    "unet3d": {"filters": (4, 6, 8, 8), "deep_supervision": True},
    "upernet": {**PYRAMID, "width": 16},
}
IMAGES = ("att_swin_unet", "fpn", "linear", "pranet", "unet", "upernet")
SIZE = dict.fromkeys(IMAGES, (45, 70))  # the others take volumes
VOLUME = (11, 13, 18)


def test_every_network_has_a_small_setting_here():
    assert SMALL.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_outputs(name, training):
    torch.manual_seed(0)
    network = create_model(name, in_channels=2, classes=3, activation="softmax", **SMALL[name]).train(training)
    size = SIZE.get(name, VOLUME)
    output = network(torch.randn(2, 2, *size))
    maps = [output] if isinstance(output, torch.Tensor) else list(output)
    assert len(maps) == len(network.output_names)
    assert all(m.shape[:2] == (2, 3) and m.ndim == 2 + len(size) for m in maps)
    assert maps[0].shape[2:] == size
    # Side outputs may be coarser, and come in falling resolution.
    assert [m.numel() for m in maps] == sorted((m.numel() for m in maps), reverse=True)
    assert prediction(output) is maps[0]
    assert (maps[0].sum(dim=1) - 1).abs().max() > 0.01, "logits, not probabilities"


@pytest.mark.parametrize("name", NETWORKS)
def test_builders_agree_on_the_common_arguments(name):
    parameters = inspect.signature(NETWORKS[name]).parameters
    assert {"in_channels", "classes"} <= parameters.keys()
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values()), "typos would pass"
    assert create_model(name, activation=None, **SMALL[name]) is not None


def test_the_description_is_true():
    rows = describe()
    assert [row["name"] for row in rows] == list(NETWORKS)
    for row in rows:
        assert row.keys() == {"name", "task", "input", "parameters", "paper", "licence"}
        assert sum(p.numel() for p in create_model(row["name"]).parameters()) == row["parameters"]
    rows[0]["name"] = "changed"
    assert describe()[0]["name"] != "changed"


def test_checking_builds_nothing():
    check_network({"name": "pranet", "backbone": "no such model", "activation": "sigmoid"})
    with pytest.raises(UserError, match="Did you mean 'pranet'"):
        check_network({"name": "prannet"})
    with pytest.raises(UserError, match="'va_dinat_mini' is a backbone"):
        create_model("va_dinat_mini")
    with pytest.raises(UserError, match="the key 'name' is missing"):
        check_network({})
    with pytest.raises(UserError, match="Did you mean 'backbone'"):
        check_network({"name": "pranet", "backbon": "resnet18"})


def test_describing_imports_no_timm():
    code = "import sys; from visattn.networks import describe; describe(); print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
