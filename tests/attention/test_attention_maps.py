"""Every block that weighs positions by a softmax shows its weights, and they are those that its output is made of."""

import itertools

import pytest
import torch

from visattn.attention import ATTENTION, simulate
from visattn.viz import attention_map

# Blocks without weights of positions: they mix channels, or positions by fixed or one-sided weights.
NO_MAP = {"channel", "conv", "ela", "identity", "partial_channel", "partial_spatial"}
SIZES = {1: (12,), 2: (6, 8), 3: (4, 4, 6)}
# With these no weight goes to padding, so that a map sums to 1.
SETTINGS = {
    "agent": {"agent_num": 1, "window_size": 5},
    "bilevel": {"n_win": 2, "topk": 2},
    "halo": {"block_size": 2, "halo_size": 1, "boundary": "mask"},
    "neighborhood": {"kernel_size": 3, "dilation": 1},
    "window": {"window_size": 3, "shift_size": 1},
    "grid": {"grid_size": 2},
}
RANKED = {"agent", "bilevel", "full", "grid", "halo", "lepe", "neighborhood", "partial_self", "window"}
MORE = [  # (name, settings): other forms with their own map
    ("agent", {"variant": "cswin", "split_size": 2, "agent_num": 4, "window_size": 5}),
    ("bilevel", {"variant": "nchw", "n_win": 2, "topk": 4}),
    ("bilevel", {"n_win": 2, "topk": 3, "diff_routing": True, "soft_routing": True}),
    ("full", {"variant": "e_mhsa"}),
    ("halo", {"block_size": 3, "halo_size": 0}),
    ("halo", {"block_size": 2, "halo_size": 2, "boundary": "zero"}),
    ("lepe", {"variant": "nchw"}),
    ("neighborhood", {"kernel_size": (3, 4), "dilation": (2, 1), "stride": 2, "is_causal": (False, True)}),
    ("neighborhood", {"kernel_size": 9}),
    ("position", {"form": "paper"}),
    ("window", {"window_size": (2, 4), "bias": "log_mlp", "qkv_layout": "per_head"}),
]
CASES = [
    pytest.param(name, rank, SETTINGS.get(name, {}), id=f"{name}-{rank}d")
    for name, block in sorted(ATTENTION.items())
    if name not in NO_MAP
    for rank in block.supported_ranks
] + [pytest.param(name, 2, each, id=f"{name}-2d-{number}") for number, (name, each) in enumerate(MORE)]


def build(name, rank, settings, dim=24):
    """A block in float64 whose values are its input, and without projections: out = sum of weights times x."""
    torch.manual_seed(0)
    more = {"rank": rank} if name in RANKED else {}
    more |= {"num_heads": 6} if name != "position" else {}
    block = ATTENTION[name](dim, **more, **settings).double().eval()
    width = dim // 6
    eye = torch.eye(dim, dtype=torch.float64)
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
            if parameter.dim() == 1 and (
                key == "v.bias" or any(part in key for part in ("qkv", "kv.", "proj", "wo", "output", "lepe"))
            ):
                parameter.zero_()  # biases of values and projections
        for module in ("lepe", "dwc", "get_v"):
            for each in block.modules():
                if getattr(each, module, None) is not None:
                    getattr(each, module).weight.zero_()
                    getattr(each, module).bias.zero_()
        for last in ("proj", "wo", "output_linear"):
            if hasattr(block, last):
                weight = getattr(block, last).weight
                weight.copy_(eye.reshape(weight.shape))
        if name == "halo":  # every head's keys before its values
            rows = block.kv.weight.flatten(1).view(6, 2 * width, dim)
            rows[:, width:] = eye.view(6, width, dim)
        elif name == "position":
            block.conv_d.weight.copy_(eye)
            if block.conv_d.bias is not None:
                block.conv_d.bias.zero_()
            block.gamma.fill_(1)
        elif name == "partial_self":
            rest = dim - block.convolved
            block.attn.qkv.weight[2 * rest :] = torch.eye(rest)
            block.attn.proj.weight.copy_(torch.eye(rest))
            block.attn.proj.bias.zero_()
        elif settings.get("variant") == "e_mhsa":
            block.v.weight.copy_(eye)
        else:
            own = block.qkv_linear if hasattr(block, "qkv_linear") else block.qkv
            weight = getattr(own, "qkv", own).weight
            if getattr(own, "qkv", own).bias is not None:
                getattr(own, "qkv", own).bias[2 * dim :] = 0
            if settings.get("qkv_layout") == "per_head":
                weight.view(6, 3, width, dim)[:, 2] = eye.view(6, width, dim)
            else:
                weight[2 * dim :] = eye.reshape(dim, dim, *(1,) * (weight.dim() - 2))
    return block


def parts(name, block, x):
    """The values (B, *S, h, .) that the block weighs, and its outputs without what is added or put beside them."""
    out = block(x)
    if name == "position":
        return x[..., None, :], out - x
    if name == "partial_self":
        normed = block.norm(x[..., block.convolved :])
        return normed.unflatten(-1, (6, -1)), out[..., block.convolved :]
    return x.unflatten(-1, (6, -1)), out


def example(rank):
    return torch.randn(2, *SIZES[rank], 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_the_list_of_blocks_without_a_map_is_right():
    assert {name for name, block in ATTENTION.items() if not hasattr(block, "attention_map")} == NO_MAP
    with pytest.raises(TypeError, match=r"DepthwiseConvolution.*agent, bilevel"):
        attention_map(ATTENTION["conv"](8), torch.zeros(1, 4, 4, 8), (0, 0))


@pytest.mark.parametrize(("name", "rank", "settings"), CASES)
def test_the_weights_give_the_output(name, rank, settings):
    block, x = build(name, rank, settings), example(rank)
    with torch.no_grad():
        values, out = parts(name, block, x)
    for query in itertools.product(*((0, size // 2, size - 1) for size in SIZES[rank])):
        weights = attention_map(block, x, query)
        assert weights.shape == (2, values.shape[-2], *SIZES[rank])
        assert not weights.requires_grad
        assert (weights >= 0).all()
        if settings.get("boundary") != "zero" and settings.get("halo_size") != 0:
            torch.testing.assert_close(weights.flatten(2).sum(-1), torch.ones_like(weights.flatten(2)[..., 0]))
        else:
            assert (weights.flatten(2).sum(-1) <= 1 + 1e-12).all()
        again = torch.einsum("bhn,bnhd->bhd", weights.flatten(2), values.flatten(1, -3)).flatten(1)
        if "soft_routing" not in settings:  # which multiplies the values as well
            torch.testing.assert_close(again, out[(slice(None), *query)], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("name", "rank", "settings"), CASES)
def test_a_query_outside_is_refused(name, rank, settings):
    block, x = build(name, rank, settings), example(rank)
    for wrong in (SIZES[rank], (0,) * (rank - 1) + (-1,), (0,) * (rank + 1), (0,) * (rank - 1)):
        with pytest.raises(ValueError, match="index"):
            attention_map(block, x, wrong)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_neighbourhood_sees_its_window(rank):
    settings = {"kernel_size": 2, "dilation": 2, "stride": 2, "is_causal": (True, False, False)[:rank]}
    block, x = build("neighborhood", rank, settings), example(rank)
    seen = simulate(SIZES[rank], 2, 2, 2, settings["is_causal"]).mask()
    for number, query in enumerate(itertools.product(*map(range, SIZES[rank]))):
        assert torch.equal((attention_map(block, x, query)[0, 0] > 0).flatten(), seen[number])


def reachable(name, query, sizes):
    """Which positions each block of `SETTINGS` can see, by its definition, as a mask of the map."""
    grids = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    inside = torch.ones(sizes, dtype=torch.bool)
    for at, size, along in zip(query, sizes, grids, strict=True):
        if name == "window":  # shifted by one; what comes round the border is another region
            window = (at - 1) % size // 3
            inside &= ((along - 1) % size // 3 == window) & ((along < 1) == (at < 1))
        elif name == "grid":
            inside &= along % (size // 2) == at % (size // 2)
        else:
            inside &= (along >= at // 2 * 2 - 1) & (along <= at // 2 * 2 + 2)
    return inside


@pytest.mark.parametrize("name", ["grid", "halo", "window"])
@pytest.mark.parametrize("rank", [2, 3])
def test_nothing_outside_the_window_is_seen(name, rank):
    sizes = (6, 6, 6)[:rank]
    block = build(name, rank, SETTINGS[name])
    x = torch.randn(1, *sizes, 24, dtype=torch.float64)
    for query in itertools.product((0, 1, 3, 5), repeat=rank):
        seen = attention_map(block, x, query)[0] > 0
        assert torch.equal(seen, reachable(name, query, sizes).expand(seen.shape))


def test_routing_sees_its_chosen_regions_alone():
    block, x = build("bilevel", 2, SETTINGS["bilevel"]), example(2)
    chosen = block.forward_with_attention(x).r_idx
    for query in ((0, 0), (2, 5), (5, 7)):
        seen = attention_map(block, x, query)[0, 0] > 0
        regions = {int(2 * (row // 3) + column // 4) for row, column in seen.nonzero()}
        assert regions == set(chosen[0, 2 * (query[0] // 3) + query[1] // 4].tolist())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_weights_stay_near(kind):
    for name in sorted(set(ATTENTION) - NO_MAP):
        block, x = build(name, 2, SETTINGS.get(name, {})), example(2)
        wanted = attention_map(block.to(kind).double(), x.to(kind).double(), (3, 4))
        found = attention_map(block.to(kind), x.to(kind), (3, 4))
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=0.3, atol=0.03)
