import numpy as np
import pytest
import torch

from visattn.attention.maxvit import GridAttention, WindowAttention

F64 = torch.float64
BLOCKS = {"window": (WindowAttention, "window_size"), "grid": (GridAttention, "grid_size")}


def build(kind, dim, size, **settings):
    cls, name = BLOCKS[kind]
    return cls(dim, **{name: size}, **settings)


def draw(block, seed=0, spread=0.5):
    """Weights wide enough that a wrong bias, head or window shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return block.double().eval()


def normal(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def bias_of(block, size):
    """The bias from the parameters, by query minus key."""
    state = {key: value.numpy() for key, value in block.state_dict().items()}
    sides = [2 * p - 1 for p in size]
    if block.bias == "none":
        return lambda head, offset: 0.0
    if block.bias == "log_mlp":

        def mlp(head, offset):
            d = np.array(offset, dtype=float)
            hidden = state["rel_pos.mlp.fc1.weight"] @ (np.sign(d) * np.log(1 + abs(d))) + state["rel_pos.mlp.fc1.bias"]
            return state["rel_pos.mlp.fc2.weight"][head] @ hidden.clip(0) + state["rel_pos.mlp.fc2.bias"][head]

        return mlp
    table = state["rel_pos.relative_position_bias_table"]
    if table.ndim == 2:
        return lambda head, offset: table.reshape(*sides, -1)[
            (*(o + p - 1 for o, p in zip(offset, size, strict=True)), head)
        ]
    return lambda head, offset: table[(head, *(p - 1 - o for o, p in zip(offset, size, strict=True)))]


@pytest.mark.parametrize("sizes", [(6, 4), (7, 5), (2, 3), (1, 1), (3, 4, 3)])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("window", dict()),
        ("window", dict(shift_size=1)),
        ("window", dict(shift_size=1, boundary="zero", table="grid")),
        ("window", dict(bias="none", shift_size=1)),
        ("window", dict(bias="log_mlp", bias_hidden=5, qkv_layout="per_head")),
        ("grid", dict()),
        ("grid", dict(boundary="zero", table="grid", qkv_layout="per_head")),
        ("grid", dict(bias="log_mlp", bias_hidden=5)),
        ("grid", dict(bias="none")),
    ],
    ids=str,
)
def test_oracle(reference, kind, settings, sizes):
    """Output, and the attention map of one query, on a window with different sides."""
    size = (3, 2, 2)[: len(sizes)]
    block = draw(build(kind, 4, size, num_heads=2, rank=len(sizes), **settings))
    x = normal((2, *sizes, 4))
    state = {key: value.numpy() for key, value in block.state_dict().items()}
    expected, maps = reference("maxvit").attention(
        x.numpy(),
        state,
        2,
        size,
        kind,
        bias_of(block, size),
        getattr(block, "shift_size", None),
        block.qkv_layout == "per_head",
        block.boundary,
    )
    torch.testing.assert_close(block(x), torch.from_numpy(expected), atol=1e-10, rtol=1e-9)
    query = tuple(n // 2 for n in sizes)
    weights = block.attention_map(x, query)
    assert weights.shape == (2, 2, *sizes)
    for image in range(2):
        for head in range(2):
            inside = torch.zeros(sizes, dtype=F64)
            for key, weight in maps[image, query, head].items():
                if all(k < n for k, n in zip(key, sizes, strict=True)):
                    inside[key] = float(weight)
            torch.testing.assert_close(weights[image, head], inside, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("head_first", [True, False])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("bias", dict(bias="table")),
        ("bias_tf", dict(bias="table", table="grid")),
        ("mlp", dict(bias="log_mlp")),
        ("", dict(bias="none")),
    ],
)
def test_maxvit_of_timm_agrees(kind, head_first, theirs, ours):
    """Second witness, with timm's weights under their own keys."""
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    torch.manual_seed(0)
    config = MaxxVitTransformerCfg(
        dim_head=16, head_first=head_first, rel_pos_type=theirs, rel_pos_dim=512, window_size=(4, 3), grid_size=(4, 3)
    )
    other = PartitionAttentionCl(32, "block" if kind == "window" else "grid", config).eval()
    block = build(kind, 32, (4, 3), num_heads=2, qkv_layout="per_head" if head_first else "qkv", **ours).eval()
    with torch.no_grad():
        for parameter in other.attn.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    block.load_state_dict(other.attn.state_dict())
    x = torch.randn(2, 12, 9, 32)
    torch.testing.assert_close(block(x), other._partition_attn(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [0, 2])
def test_swin_of_timm_agrees(shift):
    from timm.models.swin_transformer import SwinTransformerBlock

    torch.manual_seed(0)
    other = SwinTransformerBlock(32, (12, 8), num_heads=2, window_size=4, shift_size=shift).eval()
    with torch.no_grad():
        other.attn.relative_position_bias_table.normal_()
    block = WindowAttention(32, 2, window_size=4, shift_size=shift).eval()
    prefix = "rel_pos."
    block.load_state_dict({(prefix if "table" in k else "") + k: v for k, v in other.attn.state_dict().items()})
    x = torch.randn(2, 12, 8, 32)
    torch.testing.assert_close(block(x), other._attn(x), atol=1e-5, rtol=1e-5)


def test_timm_would_notice_wrong_settings():
    """The witnesses see the layout of qkv, the direction of the bias and the shift."""
    x = normal((1, 8, 8, 8))
    base = draw(WindowAttention(8, 2, window_size=4, shift_size=2))
    for change in (dict(qkv_layout="per_head"), dict(shift_size=1), dict(bias="none")):
        other = draw(WindowAttention(8, 2, window_size=4, **(dict(shift_size=2) | change)))
        other.load_state_dict(base.state_dict(), strict=False)
        assert (other(x) - base(x)).abs().max() > 1e-2, change
    turned = draw(WindowAttention(8, 2, window_size=4, shift_size=2))
    turned.load_state_dict(base.state_dict())
    turned.rel_pos.relative_position_bias_table.data = base.rel_pos.relative_position_bias_table.data.flip(0)
    assert (turned(x) - base(x)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("settings", [dict(), dict(bias="log_mlp", bias_hidden=3), dict(boundary="zero")], ids=str)
def test_gradients(kind, settings):
    block = draw(build(kind, 4, 2, num_heads=2, **settings))
    x = normal((1, 3, 4, 4)).requires_grad_()
    names, values = zip(*block.named_parameters(), strict=True)

    def call(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_a_masked_border_is_as_if_nothing_were_there():
    """A map that fits into one window gives full attention, whatever the window adds; zeros are attended to."""
    x = normal((1, 3, 2, 8))
    block = draw(WindowAttention(8, 2, window_size=5, bias="none"))
    exact = draw(WindowAttention(8, 2, window_size=(3, 2), bias="none"))
    torch.testing.assert_close(block(x), exact(x))
    block.boundary = "zero"
    assert (block(x) - exact(x)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_heads=5), "num_heads must divide"),
        (dict(rank=1), "rank 2, 3"),
        (dict(size=0), "at least 1"),
        (dict(size=(7, 7, 7)), "2 of them"),
        (dict(bias="mlp"), "'table', 'log_mlp', 'none'"),
        (dict(table="tf"), "'flat', 'grid'"),
        (dict(qkv_layout="kqv"), "'qkv', 'per_head'"),
        (dict(boundary="shift"), "'mask', 'zero'"),
        (dict(bias_hidden_rate=0.1), "bias_hidden_rate needs bias='log_mlp'"),
        (dict(bias="log_mlp", bias_hidden=0), "bias_hidden"),
    ],
)
def test_arguments_are_checked(kind, settings, text):
    settings = dict(settings)
    with pytest.raises(ValueError, match=text):
        build(kind, 32, settings.pop("size", 7), **settings)


@pytest.mark.parametrize("shift", [7, -1, (1, 1, 1)])
def test_shift_is_checked(shift):
    with pytest.raises(ValueError, match=r"shift_size must be from 0"):
        WindowAttention(32, shift_size=shift)
