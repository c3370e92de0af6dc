"""The plain U-Net: shapes, switches, anisotropy, and that it learns."""

import pytest
import torch
from torch import nn

from visattn.errors import UserError
from visattn.networks import create_model, prediction
from visattn.networks.unet3d import Level

SMALL = {"filters": (4, 6, 8), "classes": 3}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "batch", "group"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_switch_builds_a_network_whose_parameters_all_train(dims, norm, residual):
    torch.manual_seed(0)
    network = create_model("unet3d", dims=dims, norm=norm, residual=residual, deep_supervision=True, **SMALL)
    size = (13, 10, 9)[:dims]
    outputs = network(torch.randn(2, 1, *size))
    maps = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(logits.square().mean() for logits in maps).backward()
    without = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert [key for key in without if not key.endswith("bias")] == []
    kinds = {type(module).__name__.rstrip("23d") for module in network.modules()}
    assert {"instance": "InstanceNorm", "batch": "BatchNorm", "group": "GroupNorm"}[norm] in kinds


def test_one_batch_is_learned():
    torch.manual_seed(0)
    network = create_model("unet3d", filters=(8, 16), classes=1)
    x = torch.randn(1, 1, 8, 8, 8)
    target = (x > 0.5).float()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss = nn.functional.binary_cross_entropy_with_logits(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_thick_slices():
    """A stride of 1 keeps an axis, and a kernel of 1 keeps slices apart."""
    network = create_model(
        "unet3d",
        filters=(4, 6),
        strides=[[1, 2, 2]],
        kernels=[[1, 3, 3], [1, 3, 3]],
        norm="batch",
    ).eval()
    assert network.reductions == [[1, 1, 1], [1, 2, 2]]
    x = torch.randn(1, 1, 3, 10, 12)
    with torch.no_grad():
        both = network(x)
        alone = torch.cat([network(x[:, :, i : i + 1]) for i in range(3)], dim=2)
    torch.testing.assert_close(both, alone)


def test_deep_supervision_gives_all_levels_but_the_lowest():
    network = create_model("unet3d", filters=(4, 4, 6, 8), strides=[2, [1, 2, 2], 2], deep_supervision=True)
    maps = network(torch.randn(1, 1, 9, 16, 21))
    assert network.output_names == ("logits", "logits_1")
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 16, 21), (5, 8, 11)]
    assert prediction(maps) is maps[0]


def test_padding_acts_at_the_end():
    network = create_model("unet3d", norm="batch", **SMALL).eval()
    x = torch.randn(1, 1, 7, 6, 5)
    with torch.no_grad():
        whole = network(nn.functional.pad(x, (0, 3, 0, 2, 0, 1)))
        torch.testing.assert_close(network(x), whole[..., :7, :6, :5])


def test_residual_levels_add_their_input():
    level = Level(3, 4, 4, [3, 3, 3], [1, 1, 1], "batch", residual=True).eval()
    nn.init.zeros_(level.second[0].weight)
    nn.init.zeros_(level.second[0].bias)
    x = torch.rand(1, 4, 3, 3, 3)
    torch.testing.assert_close(level(x), x)


def test_checkpointing_changes_memory_only():
    torch.manual_seed(0)
    network = create_model("unet3d", **SMALL)
    x = torch.randn(2, 1, 8, 8, 8)
    gradients = []
    for enabled in (False, True):
        network.set_grad_checkpointing(enabled)
        network.zero_grad()
        network(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": (8,)}, "filters needs at least two"),
        ({"norm": "layer"}, "norm must be instance, batch or group"),
        ({"dims": 1}, "dims must be 2 or 3"),
        ({"kernels": [3, 3]}, "kernels needs 5 entries"),
        ({"strides": [[2, 2]] * 4}, "strides needs 4 entries, each a whole number above 0 or 3 of them"),
        ({"kernels": [2] * 5}, "kernels must be odd"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        create_model("unet3d", **options)
