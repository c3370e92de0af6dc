"""Efficient local attention against the authors' outputs and a slow loop."""

import pytest
import torch

from visattn.attention.ela import EfficientLocalAttention


@pytest.mark.parametrize("variant", ["B", "L"])
def test_official_outputs(golden, variant):
    case = golden("ela", f"module_{variant.lower()}")
    block = case.load_into(EfficientLocalAttention(64, variant=variant))
    other = case.load_into(EfficientLocalAttention(64, variant=variant))
    other.gn.num_groups = 32
    for index in case.cases:
        x = case.input(index).movedim(1, -1)
        assert case.error(index, "out", block(x).movedim(-1, 1)) <= 1
        assert case.error(index, "out", other(x).movedim(-1, 1)) > 100, "the groups of the norm cannot be told apart"


@pytest.mark.parametrize(("variant", "parameters"), [("T", 448), ("B", 576), ("S", 2688), ("L", 3712)])
def test_variants_have_the_published_size(variant, parameters):
    assert sum(p.numel() for p in EfficientLocalAttention(64, variant=variant).parameters()) == parameters


@pytest.mark.parametrize(("variant", "dim"), [("T", 64), ("B", 16), ("S", 48), ("L", 16)])
@pytest.mark.parametrize("size", [(5, 3), (1, 11), (1, 1), (2, 3, 5)])
def test_loops_agree(reference, variant, dim, size):
    torch.manual_seed(0)
    block = EfficientLocalAttention(dim, variant=variant).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, *size, dim, dtype=torch.float64) + 1
    with torch.no_grad():
        expected = reference("ela").attend(x, block.conv.weight, block.gn.weight, block.gn.bias, variant)
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-12)


def test_norm_may_have_other_groups():
    block = EfficientLocalAttention(144, variant="T", norm_groups=16)
    assert block.gn.num_groups == 16
    assert "norm_groups=16" in repr(block)
    with pytest.raises(ValueError, match="multiple of 32, got 144"):
        EfficientLocalAttention(144, variant="T")
    with pytest.raises(ValueError, match="multiple of 40, got 48"):
        EfficientLocalAttention(48, norm_groups=5)


def test_one_block_takes_maps_and_volumes():
    block = EfficientLocalAttention(32)
    assert block(torch.zeros(1, 4, 5, 32)).shape == (1, 4, 5, 32)
    assert block(torch.zeros(1, 4, 5, 6, 32)).shape == (1, 4, 5, 6, 32)


def test_a_gate_depends_on_its_own_axis_alone():
    """Moving values along an axis changes that axis's gate only: the averages of the others stay."""
    torch.manual_seed(0)
    block = EfficientLocalAttention(16, variant="B").double()
    x = torch.randn(1, 6, 7, 16, dtype=torch.float64)
    rows, columns = block.gates(x)
    moved_rows, moved_columns = block.gates(x.roll(2, dims=1))
    torch.testing.assert_close(moved_columns, columns)
    assert (moved_rows - rows).abs().max() > 1e-3


def test_a_single_position_trains_in_a_batch_of_one():
    block = EfficientLocalAttention(32, variant="T").train()
    x = torch.randn(1, 1, 1, 32)
    # One value is its own mean, so what is left is the norm's bias of 0, and sigmoid(0) for each axis.
    torch.testing.assert_close(block(x), x / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 48, "variant": "T"}, "multiple of 32, got 48"),
        ({"dim": 24}, "multiple of 16, got 24"),
        ({"dim": 32, "variant": "XL"}, "'T', 'B', 'S', 'L', got 'XL'"),
        ({"dim": 0}, "dim must be an integer of at least 1"),
    ],
)
def test_refused_arguments_say_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        EfficientLocalAttention(**arguments)


@pytest.mark.parametrize("shape", [(1, 8, 32), (1, 4, 4, 16), (1, 4, 0, 32), (1, 2, 2, 2, 2, 32)])
def test_refused_inputs_say_what_is_valid(shape):
    with pytest.raises(ValueError, match="EfficientLocalAttention takes"):
        EfficientLocalAttention(32)(torch.zeros(shape))
