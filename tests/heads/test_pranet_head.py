"""PraNet's head alone: any three maps, and the parts whose form the golden cases fix."""

import pytest
import torch
from torch import nn

from visattn.heads import HEADS, PraNetHead
from visattn.heads.pranet import ConvNorm


def maps(sizes, widths=(6, 7, 11)):
    return [torch.randn(2, width, *size) for width, size in zip(widths, sizes, strict=True)]


@pytest.mark.parametrize(
    ("reductions", "sizes"),
    [
        ((8, 16, 32), [(12, 20), (6, 10), (3, 5)]),
        ((4, 8, 16), [(24, 40), (12, 20), (6, 10)]),
        ((16, 16, 16), [(6, 10), (6, 10), (6, 10)]),
        ((5, 7, 20), [(19, 31), (13, 23), (5, 8)]),
        ((8, 32, 64), [(12, 20), (3, 5), (1, 2)]),
    ],
)
@pytest.mark.parametrize("classes", [1, 3])
def test_any_three_maps(reductions, sizes, classes):
    torch.manual_seed(0)
    head = PraNetHead(list(zip((6, 7, 11), reductions, strict=True)), classes, channels=5)
    outputs = head(maps(sizes), (96, 160))
    assert [tuple(o.shape) for o in outputs] == [(2, classes, 96, 160)] * 4
    assert len(head.output_names) == 4
    sum(o.square().mean() for o in outputs).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_refinement_adds_to_the_coarser_map():
    """With branches that give nothing, every refinement is the global map, resized along the way."""
    torch.manual_seed(0)
    head = PraNetHead([(6, 16), (7, 16), (11, 16)], 2, channels=5).eval()
    for branch in head.branches:
        nn.init.zeros_(branch.last.bn.weight)
    with torch.no_grad():
        first, *others = head(maps([(6, 10)] * 3), (48, 80))
    assert first.std() > 0
    for other in others:
        torch.testing.assert_close(other, first)


def test_the_prediction_sees_all_branches_and_the_global_map_none():
    torch.manual_seed(0)
    head = PraNetHead([(6, 8), (7, 16), (11, 32)], 1, channels=5)
    outputs = dict(zip(head.output_names, head(maps([(12, 20), (6, 10), (3, 5)]), (96, 160)), strict=True))
    for name, levels in {"map5": [], "map4": [2], "map3": [1, 2], "map2": [0, 1, 2]}.items():
        head.zero_grad(set_to_none=True)
        outputs[name].square().mean().backward(retain_graph=True)
        seen = [level for level in range(3) if head.branches[level].narrow.conv.weight.grad is not None]
        assert seen == levels


def test_no_activation_where_the_official_code_has_none():
    torch.manual_seed(0)
    block = ConvNorm(3, 4, 3)
    assert block(torch.randn(2, 3, 8, 8)).min() < -0.5


def test_maps_that_do_not_fit():
    assert HEADS["pranet"] is PraNetHead
    with pytest.raises(ValueError, match="three feature maps, got 2"):
        PraNetHead([(6, 8), (7, 16)])
    with pytest.raises(ValueError, match="finest map first"):
        PraNetHead([(11, 32), (7, 16), (6, 8)])
