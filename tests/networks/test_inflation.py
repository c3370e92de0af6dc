"""Volumes whose slices are all alike give in their middle what the image gives, once weights are inflated."""

import pytest
import timm
import torch
from torch import nn

import visattn
from visattn.errors import UserError
from visattn.networks import create_model

# Those for which the property holds: what they see of a volume of equal slices is what they see of the slice.
MIXERS = {
    "conv": {"name": "conv", "kernel_size": 3},
    "neighborhood": {"name": "neighborhood", "kernel_size": 3},
    "dilated": {"name": "neighborhood", "kernel_size": 3, "dilation": 2},
    "window": {"name": "window", "window_size": 4},
    "window_grid": {"name": "window", "window_size": 4, "table": "grid"},
    "window_mlp": {"name": "window", "window_size": 4, "bias": "log_mlp"},
    "halo": {"name": "halo", "block_size": 4, "halo_size": 1, "boundary": "mask"},
    "identity": "identity",
}


def randomised(network: nn.Module) -> nn.Module:
    """Every weight drawn anew, so that nothing passes because it is zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def both(mixer, **options):
    plan = {"depths": (1, 1), "widths": (8, 16), "strides": (2, 2), "attention": mixer, "num_classes": 0, **options}
    return [timm.create_model("va_pyramid", dims=dims, in_chans=2, features_only=True, **plan) for dims in (2, 3)]


@pytest.mark.parametrize("name", MIXERS)
def test_the_middle_of_equal_slices_is_the_slice(name):
    image_net, volume_net = (randomised(each) for each in both(MIXERS[name]))
    visattn.inflate(image_net.state_dict(), volume_net)
    image = torch.randn(1, 2, 24, 20)
    with torch.no_grad():
        flat = image_net(image)
        deep = volume_net(image[:, :, None].expand(-1, -1, 64, -1, -1))
    for one, other in zip(flat, deep, strict=True):
        middle = other[:, :, other.shape[2] // 2]
        assert (middle - one).abs().max() < 1e-4 * one.abs().max()
    assert all(not value.any() for key, value in volume_net.state_dict().items() if key.endswith("depth_rel"))
    end = deep[-1][:, :, 0]
    assert name == "identity" or (end - flat[-1]).abs().max() > 1e-3, "zeros beyond the ends are seen there"


def test_a_whole_u_net_with_transposed_kernels():
    plan = {
        "backbone": "va_pyramid", "classes": 2, "norm": "batch", "upsample": "transpose", "in_channels": 1,
        "backbone_args": {"depths": (1, 1), "widths": (8, 16), "strides": (2, 2), "attention": "conv"},
    }  # fmt: skip
    image_net, volume_net = (randomised(create_model("unet", dims=dims, **plan)) for dims in (2, 3))
    visattn.inflate(image_net.state_dict(), volume_net)
    image = torch.randn(1, 1, 16, 24)
    with torch.no_grad():
        one, other = image_net(image), volume_net(image[:, :, None].expand(-1, -1, 96, -1, -1))
    assert (other[:, :, 48] - one).abs().max() < 1e-4 * one.abs().max()


def test_channels_are_summed_into_one():
    image_net, volume_net = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 4, 3)
    visattn.inflate(image_net.state_dict(), volume_net)
    grey = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        one = image_net(grey.expand(-1, 3, -1, -1))
        other = volume_net(grey[:, :, None].expand(-1, -1, 5, -1, -1))
    torch.testing.assert_close(other[:, :, 1], one)


def test_what_has_no_counterpart_is_refused_and_nothing_changed():
    image_net, volume_net = both("conv", depths=(1, 2))
    _, other = both("conv")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError, match=r"an entry that the network for volumes has not: \S*stages"):
        visattn.inflate(image_net.state_dict(), other)
    with pytest.raises(UserError, match="no entry for"):
        visattn.inflate(both("conv")[0].state_dict(), volume_net)
    state = {**both("conv")[0].state_dict()}
    key = next(key for key in state if key.endswith("fc1.weight"))
    state[key] = state[key][:, :3]
    with pytest.raises(UserError, match=r"fc1.weight is \(24, 3\) for images and \(24, 8\) for volumes"):
        visattn.inflate(state, other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    layers = [conv(4, 8 * many, 1) for conv, many in ((nn.Conv2d, 4), (nn.Conv3d, 8))]  # of pixel shuffle
    with pytest.raises(UserError, match="no rule that leads"):
        visattn.inflate(layers[0].state_dict(), layers[1])
