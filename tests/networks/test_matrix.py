"""Every block in encoder and decoder, every fusion on the skips, in 2-D and 3-D: what composes also learns.

The fast tier takes one size for each pair, `make test-all` every size.
"""

import itertools

import pytest
import torch

from visattn.attention import ATTENTION, FUSION
from visattn.heads.unet import SKIPS, UPSAMPLING
from visattn.networks import create_model

SIZES = {
    2: {"square": (32, 32), "odd": (29, 35), "any": (24, 44)},
    3: {"square": (16,) * 3, "odd": (13, 17, 11), "any": (12, 20, 16)},
}
SETTINGS = {
    **{f"encoder-{name}": {"backbone_args": {"attention": name}} for name in ATTENTION},
    **{f"decoder-{name}": {"decoder": name} for name in ("conv", "residual", *ATTENTION)},
    **{f"skip-{name}": {"skip": name} for name in SKIPS},
    **{f"upsample-{name}": {"upsample": name, "deep_supervision": True} for name in UPSAMPLING},
}


def cases():
    for (i, setting), dims in itertools.product(enumerate(SETTINGS), (2, 3)):
        for j, size in enumerate(SIZES[dims]):
            marks = [] if (i + dims) % 3 == j else [pytest.mark.slow]
            yield pytest.param(setting, dims, size, marks=marks, id=f"{setting}-{dims}d-{size}")


def build(setting, dims):
    arguments = dict(SETTINGS[setting])
    plan = {"widths": (16, 32), "depths": (1, 1), "strides": (2, 2), "attention": "identity"}
    plan |= arguments.pop("backbone_args", {})
    return create_model(
        "unet", dims=dims, backbone="va_pyramid", in_channels=2, classes=3, backbone_args=plan, **arguments
    )


@pytest.mark.parametrize(("setting", "dims", "size"), list(cases()))
def test_composes_and_learns(setting, dims, size):
    torch.manual_seed(0)
    network = build(setting, dims)
    shape = SIZES[dims][size]
    x, target = torch.randn(2, 2, *shape), torch.randint(3, (2, *shape))
    x = x + target[:, None]  # something to learn

    def loss():
        output = network(x)
        maps = [output] if isinstance(output, torch.Tensor) else output
        assert maps[0].shape == (2, 3, *shape)
        total = torch.nn.functional.cross_entropy(maps[0], target)
        for side in maps[1:]:
            total = total + 0.1 * side.square().mean()
        return total

    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    before = loss()
    assert before.isfinite()
    before.backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    # Nothing but zeros is no gradient either: only a bias that a norm takes out again may have them, and what stands
    # behind position attention's factor, which starts at 0.
    starts_at_zero = ("conv_b.weight", "conv_c.weight", "conv_d.weight") if "position" in setting else ()
    silent = [name for name, p in network.named_parameters() if not p.grad.any()]
    assert [name for name in silent if not name.endswith(("bias", *starts_at_zero))] == []
    optimizer.step()
    with torch.no_grad():
        assert loss() < before


def test_every_fusion_and_block_is_in_the_matrix():
    assert {f"skip-{name}" for name in FUSION} <= SETTINGS.keys()
    assert {f"{place}-{name}" for name in ATTENTION for place in ("encoder", "decoder")} <= SETTINGS.keys()
