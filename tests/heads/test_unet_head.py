"""The decoder of a U-Net over lists of maps that no usual backbone gives."""

import itertools

import pytest
import torch
from torch import nn

from visattn.attention import ATTENTION, FUSION
from visattn.errors import UserError
from visattn.heads.unet import DECODERS, SKIPS, UPSAMPLING, UNetHead, fit, unfold_channels

FEATURES = {
    "one map": [(8, 4)],
    "full resolution": [(4, 1), (6, 2)],
    "finest a quarter": [(4, 4), (8, 8)],
    "leaps": [(4, 2), (8, 16)],
    "equal maps": [(8, 16), (8, 16), (8, 16)],
    "patches of 14": [(4, 7), (8, 14)],
    "each its axes": [(4, (1, 2)), (8, (2, 2)), (12, (2, 4))],
    "no multiples": [(4, 3), (6, 5), (8, 12)],
    "coarse before fine": [(4, 8), (6, 4), (8, 16)],
}


def maps_of(features, size, batch=1):
    found = []
    for width, reduction in features:
        steps = (reduction,) * len(size) if isinstance(reduction, int) else (*reduction, *[2] * (len(size) - 2))
        found.append(torch.randn(batch, width, *(-(-side // step) for side, step in zip(size, steps, strict=True))))
    return found


@pytest.mark.parametrize("upsample", UPSAMPLING)
@pytest.mark.parametrize("features", FEATURES)
def test_any_list_of_maps_leads_to_the_full_resolution(features, upsample):
    torch.manual_seed(0)
    plan, size = FEATURES[features], (61, 48)
    head = UNetHead(plan, 3, upsample=upsample, norm="group", deep_supervision=True)
    maps = [each.requires_grad_() for each in maps_of(plan, size)]
    output = head(maps, size)
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    assert outputs[0].shape == (1, 3, *size)
    assert len(outputs) == len(head.output_names)
    torch.stack([each.square().mean() for each in outputs]).sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in maps), "every map is read"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("upsample", UPSAMPLING)
def test_maps_lie_where_they_belong(upsample):
    """A spot in the coarsest map is decoded to where it is, also where one reduction is no multiple of the next."""
    torch.manual_seed(0)
    for plan in ([(4, 2), (4, 8)], [(4, 3), (4, 8)], [(4, 2), (4, 3), (4, 7)]):
        head = UNetHead(plan, 1, upsample=upsample).eval()  # its norms are as good as none, so a spot stays local
        size = (336, 336)
        maps = maps_of(plan, size)
        side = maps[-1].shape[-1]
        row, column = side // 3, 2 * side // 3
        with torch.no_grad():
            plain = head(maps, size)
            maps[-1][..., row, column] += 5.0
            moved = head(maps, size)[0, 0] != plain[0, 0]
        step = size[0] / side
        for axis, where in ((1, row), (0, column)):
            hit = moved.any(axis).nonzero()
            centre = float(hit.min() + hit.max() + 1) / 2
            assert centre == pytest.approx((where + 0.5) * step, abs=0.35 * step), (plan, upsample)


def test_wrong_names_and_arguments_are_told_with_the_right_ones():
    features = [(8, 2), (16, 4)]
    for arguments, words in (
        ({"skip": "conat"}, ["unknown skip 'conat'", "Did you mean 'concat'", *SKIPS]),
        ({"decoder": "neigborhood"}, ["unknown decoder", "Did you mean 'neighborhood'", *DECODERS]),
        ({"upsample": "nearest"}, ["unknown upsample", *UPSAMPLING]),
        ({"skip": {"name": "gate", "from": "max"}}, ["skip 'gate' has no argument 'from'", "form"]),
        ({"skip": {"name": "add", "dim": 3}}, ["skip 'add' takes no arguments"]),
        ({"decoder": {"name": "conv", "kernel_size": 5}}, ["decoder 'conv' takes no arguments"]),
        ({"decoder": {"name": "window", "window": 5}}, ["window_size"]),
        ({"decoder": {"name": "window", "window_size": 0}}, ["window_size"]),
        ({"decoder": {}}, ["unknown decoder 'None'"]),
        ({"channels": (8, 8)}, ["channels needs 1 whole number above 0"]),
        ({"channels": (0,)}, ["channels"]),
        ({"channels": 8}, ["channels"]),
        ({"depth": 0}, ["depth"]),
        ({"norm": "layer"}, ["norm"]),
        ({"drop_path_rate": 1.5}, ["drop_path_rate"]),
    ):
        with pytest.raises(UserError) as caught:
            UNetHead(features, 2, **arguments)
        text = str(caught.value)
        assert all(word in text for word in words), (arguments, text)
        assert len(text.splitlines()) <= 6
    assert set(FUSION) < set(SKIPS)
    assert set(ATTENTION) < set(DECODERS)


def test_pixel_shuffle_puts_channels_where_torch_does():
    x = torch.randn(2, 12, 3, 5)
    # Torch's channels vary fastest over the finer positions, ours over the channels of the result.
    theirs = nn.functional.pixel_shuffle(x.unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2), 2)
    assert torch.equal(unfold_channels(x, (2, 2)), theirs)


def test_fit_crops_and_repeats_the_end():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert fit(x, (3, 2))[0, 0].tolist() == [[0, 1], [3, 4], [3, 4]]


def test_depth_width_and_checkpoints():
    torch.manual_seed(0)
    plan = [(4, 2), (8, 4)]
    one, two = (UNetHead(plan, 1, depth=depth, channels=(12,), norm="group") for depth in (1, 2))
    assert sum(p.numel() for p in two.parameters()) > 1.5 * sum(p.numel() for p in one.parameters())
    assert two.levels[0].width == 12
    maps = maps_of(plan, (16, 16))
    gradients = []
    for checkpointing in (False, True):
        two.set_grad_checkpointing(checkpointing)
        two.zero_grad()
        two.train()(maps, (16, 16)).square().mean().backward()
        gradients.append([p.grad.clone() for p in two.parameters()])
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(*gradients))
