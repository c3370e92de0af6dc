import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from visattn.attention import _routing as routing
from visattn.attention import bilevel
from visattn.attention._backend import scaled_dot_product
from visattn.attention.bilevel import BiLevelRoutingAttention
from visattn.attention.lepe import LePEAttention

F64 = torch.float64


def arrays(block):
    return {key: value.detach().numpy() for key, value in block.state_dict().items()}


def draw(block, seed=0, spread=0.6):
    """Weights wide enough that a wrong scale, head or region shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return block.double().eval()


def normal(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Block(nn.Module):
    """The published residual block around an attention: what the cases `block_*` pin, NCHW in and out."""

    def __init__(self, dim, attn, mlp_ratio=3):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_ratio * dim), nn.Identity(), nn.GELU(), nn.Linear(mlp_ratio * dim, dim)
        )

    def forward(self, x):
        x = (x + self.pos_embed(x)).movedim(1, -1)
        x = x + self.attn(self.norm1(x))
        return (x + self.mlp(self.norm2(x))).movedim(-1, 1)


LEGACY = {
    "bra_a": dict(dim=64, num_heads=2, n_win=7, topk=4, side_dwconv=5),
    "bra_b": dict(
        dim=96,
        num_heads=3,
        n_win=4,
        topk=3,
        kv_downsample_mode="ada_avgpool",
        kv_per_win=2,
        side_dwconv=3,
        soft_routing=True,
    ),
}


@pytest.mark.parametrize("variant", LEGACY)
def test_golden_legacy(golden, variant):
    case = golden("biformer", variant)
    block = case.load_into(BiLevelRoutingAttention(**LEGACY[variant]))
    for i in case.cases:
        x = case.input(i)
        result = block.forward_with_attention(x)
        assert case.error(i, "out", block(x)) < 1
        assert case.error(i, "out", result.out) < 1
        assert case.error(i, "r_weight", result.r_weight) < 1
        assert case.error(i, "r_idx", result.r_idx.float()) == 0
        assert case.error(i, "attn", result.attention.flatten(0, 1)) < 1


def test_golden_nchw(golden):
    case = golden("biformer", "bra_nchw_a")
    block = case.load_into(BiLevelRoutingAttention(64, 4, variant="nchw", n_win=7, topk=4, side_dwconv=5))
    for i in case.cases:
        x = case.input(i)
        result = block.forward_with_attention(x)
        assert case.error(i, "out", block(x)) < 1
        assert case.error(i, "attn", result.attention.transpose(1, 2)) < 1


def test_golden_blocks(golden):
    attentions = {
        "block_topk4": (128, BiLevelRoutingAttention(128, 4, topk=4, side_dwconv=5)),
        "block_lepe": (256, LePEAttention(256)),  # its own default of 8 heads, whatever the block's num_heads
    }
    for variant, (dim, attn) in attentions.items():
        case = golden("biformer", variant)
        block = case.load_into(Block(dim, attn))
        for i in case.cases:
            assert case.error(i, "out", block(case.input(i))) < 1, (variant, i)


def test_golden_cases_see_each_choice(golden):
    """The tolerance is tight enough to tell the variants, the scale, the routing and the padding apart."""
    case = golden("biformer", "bra_b")
    wrong = dict(LEGACY["bra_b"])
    for change in (
        dict(kv_per_win=3),
        dict(soft_routing=False),
        dict(topk=2),
        dict(qk_scale=32**-0.5),
        dict(kv_downsample_mode="ada_maxpool"),
    ):
        block = case.load_into(BiLevelRoutingAttention(**(wrong | change)))
        assert case.error(0, "out", block(case.input(0))) > 100, change
    case = golden("biformer", "bra_nchw_a")
    state = case.state_dict()
    legacy = BiLevelRoutingAttention(64, 4, topk=4, side_dwconv=5).eval()
    rename = {"qkv_linear": "qkv.qkv", "output_linear": "wo"}
    for key, value in state.items():
        name, leaf = key.rsplit(".", 1)
        target = legacy.get_parameter(f"{rename.get(name, name)}.{leaf}")
        target.data.copy_(value.reshape(target.shape))
    assert case.error(0, "out", legacy(case.input(0))) < 1  # divisible: both forms agree
    assert case.error(1, "out", legacy(case.input(1))) > 100  # 30 x 25 is not


@pytest.mark.parametrize("sizes", [(14, 9), (11, 6), (1, 1), (5, 4, 3)])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(variant="nchw"),
        dict(qk_dim=8, qk_scale=0.7, side_dwconv=0, param_attention="qkv"),
        dict(soft_routing=True, diff_routing=True, param_routing=True),
        dict(kv_downsample_mode="ada_maxpool", kv_per_win=2),
        dict(kv_downsample_mode="avgpool", kv_downsample_ratio=2, soft_routing=True),
        dict(kv_downsample_mode="maxpool", kv_downsample_ratio=3),
        dict(topk=3),
    ],
    ids=str,
)
def test_oracle(reference, settings, sizes):
    rank = len(sizes)
    settings = dict(n_win=3 if rank == 2 else 2, topk=2, num_heads=2, rank=rank, side_dwconv=3) | settings
    block = draw(BiLevelRoutingAttention(12, **settings))
    x = normal((2, *sizes, 12))
    out, r_weight, r_idx, attention = reference("bilevel").bilevel(
        x.numpy(),
        arrays(block),
        2,
        settings["n_win"],
        settings["topk"],
        variant=block.variant,
        scale=settings.get("qk_scale"),
        mode=block.kv_downsample_mode,
        per_win=block.kv_per_win,
        ratio=block.kv_downsample_ratio,
        soft=block.soft_routing,
    )
    np.testing.assert_allclose(block(x).detach(), out, atol=1e-10, rtol=1e-9)
    result = block.forward_with_attention(x)
    np.testing.assert_allclose(result.out.detach(), out, atol=1e-10, rtol=1e-9)
    np.testing.assert_allclose(result.r_weight.detach(), r_weight, atol=1e-10)
    if sizes != (1, 1):  # there, all padded regions tie, and any choice among them gives the same output
        assert (result.r_idx.numpy() == r_idx).all()
        np.testing.assert_allclose(result.attention.flatten(0, 2).detach(), np.stack(attention), atol=1e-10)


@pytest.mark.parametrize("variant", ["legacy", "nchw"])
@pytest.mark.parametrize("sizes", [(3, 5), (1, 1), (2, 3, 2)])
def test_lepe_oracle(reference, variant, sizes):
    block = draw(LePEAttention(8, 2, variant=variant, rank=len(sizes), side_dwconv=3, qkv_bias=True))
    x = normal((2, *sizes, 8))
    np.testing.assert_allclose(
        block(x).detach(), reference("bilevel").lepe(x.numpy(), arrays(block), 2, variant), atol=1e-10
    )


def test_lepe_variants_differ():
    legacy, nchw = (draw(LePEAttention(16, 2, variant=v)) for v in ("legacy", "nchw"))
    x = normal((1, 4, 5, 16))
    for key, value in legacy.state_dict().items():
        nchw.get_parameter(key).data.copy_(value.reshape(nchw.get_parameter(key).shape))
    assert (legacy(x) - nchw(x)).abs().max() > 0.1


@pytest.mark.parametrize("sizes", [(14, 14), (9, 14)])
@pytest.mark.parametrize("topk", [17, 30, 49])
@pytest.mark.parametrize("mode", ["identity", "ada_avgpool"])
def test_dense_path_equals_gathered_path(monkeypatch, sizes, topk, mode):
    block = draw(BiLevelRoutingAttention(16, 2, topk=topk, kv_downsample_mode=mode, kv_per_win=1))
    x = normal((2, *sizes, 16)).requires_grad_()
    used = []
    dense = BiLevelRoutingAttention._attend_dense
    monkeypatch.setattr(BiLevelRoutingAttention, "_attend_dense", lambda *a: used.append(1) or dense(*a))
    out = block(x)
    assert used == [1]
    grad = torch.autograd.grad(out.square().sum(), x)[0]
    monkeypatch.setattr(BiLevelRoutingAttention, "_dense", lambda *a: False)
    other = block(x)
    assert used == [1]
    torch.testing.assert_close(out, other, atol=1e-10, rtol=1e-9)
    torch.testing.assert_close(grad, torch.autograd.grad(other.square().sum(), x)[0], atol=1e-9, rtol=1e-8)


def test_the_mask_is_built_in_parts(monkeypatch):
    """Of a large map no mask of all pairs of tokens exists at any time, and the parts give the same."""
    block = draw(BiLevelRoutingAttention(16, 2, topk=40, n_win=7))
    x = normal((2, 14, 21, 16))
    whole = block(x)
    shapes = []

    def watch(q, k, v, mask, scale):
        shapes.append(tuple(mask.shape))
        return scaled_dot_product(q, k, v, mask, scale)

    monkeypatch.setattr(routing, "scaled_dot_product", watch)
    monkeypatch.setattr(routing, "MASK_ENTRIES", 20 * 6 * 49 * 6)
    torch.testing.assert_close(block(x), whole)
    assert shapes == [(2, 1, 120, 294), (2, 1, 120, 294), (2, 1, 54, 294)]


def test_border_policies():
    """Legacy attends to padded tokens, which hold the projection's bias; nchw to zeros."""
    x = normal((1, 5, 5, 8))
    legacy = draw(BiLevelRoutingAttention(8, 2, n_win=2, topk=1, side_dwconv=0))
    moved = draw(BiLevelRoutingAttention(8, 2, n_win=2, topk=1, side_dwconv=0))
    moved.qkv.qkv.bias.data[16:] += 1  # the bias of values
    change = moved(x) - legacy(x)
    # All values move by one, padded ones too, so every output moves by the same vector.
    torch.testing.assert_close(change, change[:, :1, :1].expand_as(change))
    nchw = draw(BiLevelRoutingAttention(8, 2, n_win=2, topk=1, side_dwconv=0, variant="nchw"))
    other = draw(BiLevelRoutingAttention(8, 2, n_win=2, topk=1, side_dwconv=0, variant="nchw"))
    other.qkv_linear.bias.data[16:] += 1
    change = other(x) - nchw(x)
    assert (change - change[:, :1, :1]).abs().max() > 0.1  # zeros outside stay zeros


def test_auto_pad_off_names_the_size_to_pad_to():
    block = BiLevelRoutingAttention(8, 2, auto_pad=False)
    assert block(torch.zeros(1, 14, 7, 8)).shape == (1, 14, 7, 8)
    with pytest.raises(ValueError, match=r"pad \(13, 8\) to \(14, 14\)"):
        block(torch.zeros(1, 13, 8, 8))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_heads=5), "num_heads must divide"),
        (dict(variant="nhwc"), "'legacy', 'nchw'"),
        (dict(rank=1), "rank 2, 3"),
        (dict(topk=50), "at most the 49 regions"),
        (dict(topk=0), "at least 1"),
        (dict(n_win=(7, 7, 7)), "2 of them"),
        (dict(qk_dim=12), "multiple of num_heads"),
        (dict(side_dwconv=4), "must be odd"),
        (dict(side_dwconv=-1), "must be odd"),
        (dict(kv_downsample_mode="conv"), "'ada_avgpool'"),
        (dict(param_attention="none"), "'qkvo', 'qkv'"),
        (dict(param_routing=True), "needs diff_routing"),
        (dict(diff_routing=True), "needs soft_routing"),
        (dict(variant="nchw", soft_routing=True, qk_dim=16), "no qk_dim, soft_routing"),
    ],
)
def test_arguments_are_checked(settings, text):
    with pytest.raises(ValueError, match=text):
        BiLevelRoutingAttention(32, **settings)


@pytest.mark.parametrize("block", [BiLevelRoutingAttention, LePEAttention])
def test_inputs_are_checked(block):
    for shape in ((1, 8, 32), (1, 8, 8, 16), (1, 0, 8, 32)):
        with pytest.raises(ValueError, match="takes"):
            block(32)(torch.zeros(shape))


@pytest.mark.parametrize("variant", ["legacy", "nchw"])
def test_half_precision_routes_as_full_precision_does(variant):
    block = BiLevelRoutingAttention(32, 4, topk=2, variant=variant).eval()
    x = torch.randn(2, 23, 30, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = block.double().forward_with_attention(x.double())
    rounded = block.bfloat16()
    exact_weights = BiLevelRoutingAttention(32, 4, topk=2, variant=variant).double()
    exact_weights.load_state_dict(rounded.state_dict())
    half = rounded.forward_with_attention(x)
    full = exact_weights.forward_with_attention(x.double())
    assert (half.r_idx == full.r_idx).all()
    assert exact.out.dtype == F64
    torch.testing.assert_close(half.out.double(), full.out, atol=2e-2, rtol=2e-2)


def test_routing_learns_only_when_asked_to():
    hard = BiLevelRoutingAttention(16, 2, n_win=2, topk=2, soft_routing=True, param_attention="qkv")
    weight, _ = hard._route(torch.randn(1, 4, 16))
    assert not weight.requires_grad
    soft = BiLevelRoutingAttention(16, 2, n_win=2, topk=2, soft_routing=True, diff_routing=True, param_routing=True)
    soft(torch.randn(1, 8, 8, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in soft.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(variant="nchw"),
        dict(soft_routing=True, diff_routing=True, param_routing=True, kv_downsample_mode="ada_avgpool", kv_per_win=1),
        dict(topk=4),
        dict(rank=3, num_heads=1),
    ],
    ids=str,
)
def test_gradients(settings):
    settings = dict(num_heads=2, n_win=2, topk=2) | settings
    block = draw(BiLevelRoutingAttention(4, **settings), spread=0.4)
    x = normal((1, *(3, 4, 2)[: block.rank], 4)).requires_grad_()
    names, values = zip(*block.named_parameters(), strict=True)

    def call(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("variant", ["legacy", "nchw"])
def test_attention_map(variant):
    block = draw(BiLevelRoutingAttention(8, 2, n_win=2, topk=2, variant=variant, side_dwconv=0), spread=0.3)
    x = normal((2, 6, 4, 8))
    query = (4, 1)
    weights = block.attention_map(x, query)
    assert weights.shape == (2, 2, 6, 4)
    torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones(2, 2, dtype=F64))
    v = torch.nn.functional.linear(x, *block._projections()[2]).unflatten(-1, (2, 4))  # (B, H, W, h, d)
    mixed = torch.einsum("bhyx,byxhd->bhd", weights, v).flatten(1)
    out = mixed @ (block.wo if variant == "legacy" else block.output_linear).weight.flatten(1).T
    out = out + (block.wo if variant == "legacy" else block.output_linear).bias
    torch.testing.assert_close(out, block(x)[:, 4, 1])
    with pytest.raises(ValueError, match="identity"):
        BiLevelRoutingAttention(8, 2, kv_downsample_mode="avgpool").attention_map(x.float(), query)


def test_lepe_attention_map():
    block = draw(LePEAttention(8, 2, side_dwconv=0), spread=0.3)
    x = normal((2, 3, 4, 8))
    weights = block.attention_map(x, (2, 1))
    v = torch.nn.functional.linear(x, block.qkv.weight[16:]).unflatten(-1, (2, 4))
    out = block.proj(torch.einsum("bhyx,byxhd->bhd", weights, v).flatten(1))
    torch.testing.assert_close(out, block(x)[:, 2, 1])


def test_lepe_drops_only_in_training():
    block = LePEAttention(16, 2, attn_drop=0.5)
    x = torch.randn(1, 4, 4, 16)
    torch.manual_seed(0)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
    assert math.isclose(block.scale, 8**-0.5)


@pytest.mark.parametrize("topk", [1, 4])
@pytest.mark.parametrize("size", [(12, 9), (11, 8)])
@pytest.mark.parametrize("variant", ["legacy", "nchw"])
def test_the_way_of_few_operators_computes_the_same(monkeypatch, variant, size, topk):
    """Outputs and gradients of what a GPU takes."""
    torch.manual_seed(0)
    plain = BiLevelRoutingAttention(16, 4, variant=variant, topk=topk, n_win=3).double()
    few = copy.deepcopy(plain)
    inputs = [torch.randn(2, *size, 16, dtype=torch.float64, requires_grad=True)]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    weight = torch.randn(2, *size, 16, dtype=torch.float64)
    expected = plain(inputs[0])
    for module in (bilevel, routing):
        monkeypatch.setattr(module, "launch_bound", lambda x: True)
    found = few(inputs[1])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for out in (expected, found):
        (out * weight).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(plain.parameters(), few.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)
