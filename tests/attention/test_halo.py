import pytest
import torch

from visattn.attention import _halo_product
from visattn.attention.halo import HaloAttention

F64 = torch.float64


def draw(block, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return block.double().eval()


def normal(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def arrays(block):
    return {key: value.detach().numpy() for key, value in block.state_dict().items()}


SETTINGS = [
    dict(),
    dict(boundary="mask"),
    dict(halo_size=0),
    dict(halo_size=5),  # reaches beyond the neighbouring block
    dict(block_size=(4, 2), halo_size=(1, 2), stride=2),
    dict(block_size=3, stride=2),  # average pool
    dict(block_size=4, stride=2, avg_down=True, boundary="mask"),
    dict(dim_out=10, dim_head=3, qkv_bias=True, scale_pos_embed=True),
]


@pytest.mark.parametrize("sizes", [(6, 4), (7, 5), (1, 1), (2, 9)])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_oracle(reference, settings, sizes):
    settings = dict(block_size=3, halo_size=1, dim_head=2) | settings
    block = draw(HaloAttention(6, 2, **settings))
    x = normal((2, *sizes, 6))
    expected, _ = reference("halo").halo(
        x.numpy(),
        arrays(block),
        2,
        block.block_size,
        block.halo_size,
        block.dim_head,
        block.query_stride,
        block.boundary,
        block.scale_pos_embed,
        block.stride if block.pooled else 1,
    )
    torch.testing.assert_close(block(x), torch.from_numpy(expected), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("boundary", ["zero", "mask"])
@pytest.mark.parametrize("stride", [1, 2])
def test_oracle_in_three_dimensions(reference, boundary, stride):
    block = draw(
        HaloAttention(
            4, 2, rank=3, block_size=(2, 4, 2), halo_size=(1, 0, 1), dim_head=2, stride=stride, boundary=boundary
        )
    )
    x = normal((1, 3, 5, 4, 4))
    expected, _ = reference("halo").halo(
        x.numpy(), arrays(block), 2, block.block_size, block.halo_size, 2, stride, boundary
    )
    torch.testing.assert_close(block(x), torch.from_numpy(expected), atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(stride=2),
        dict(stride=2, avg_down=True),
        dict(stride=2, block_size=7, halo_size=2, qk_ratio=0.33),
        dict(dim_out=96, qkv_bias=True, scale_pos_embed=True),
        dict(num_heads=4, dim_head=8, block_size=4),
    ],
    ids=str,
)
def test_timm_agrees(settings):
    """Second witness: timm's module, with its weights taken as they are."""
    from timm.layers.halo_attn import HaloAttn

    settings = dict(num_heads=8) | settings
    torch.manual_seed(0)
    theirs = HaloAttn(64, **settings).eval()
    ours = HaloAttention(64, **settings).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    side = settings.get("block_size", 8)
    x = torch.randn(2, 3 * side, 2 * side, 64)
    expected = theirs(x.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(ours(x), expected, atol=2e-5, rtol=1e-4)
    assert expected.std() > 0.05


@pytest.mark.parametrize("boundary", ["zero", "mask"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("chunk", [1, 500, 2**20])
def test_chunks_equal_the_plain_form(monkeypatch, boundary, rank, chunk):
    """Output and every gradient, with one block at a time, a few, and all."""
    block = draw(HaloAttention(8, 2, rank=rank, block_size=2, halo_size=1, boundary=boundary, qkv_bias=True))
    x = normal((2, *(5, 4, 3)[:rank], 8)).requires_grad_()
    weight = normal((2, *(5, 4, 3)[:rank], 8), 2)
    inputs = [x, *block.parameters()]
    monkeypatch.setattr(_halo_product, "CHUNK", chunk)
    calls = []
    parts = _halo_product._parts
    monkeypatch.setattr(_halo_product, "_parts", lambda *a: calls.append(len(parts(*a))) or parts(*a))
    out = block(x)
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    blocks = 2 * 3 * 2 * (2 if rank == 3 else 1)
    assert calls[0] == {1: blocks, 2**20: 1}.get(chunk, calls[0])
    assert len(calls) == 2

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    other = block(x)
    assert len(calls) == 2  # the plain form was taken
    torch.testing.assert_close(out, other, atol=1e-12, rtol=1e-10)
    for ours, theirs in zip(grads, torch.autograd.grad((other * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)
        assert ours.abs().max() > 0


@pytest.mark.parametrize(
    "settings", [dict(), dict(boundary="mask", stride=2, scale_pos_embed=True), dict(rank=3)], ids=str
)
def test_gradients(settings):
    block = draw(HaloAttention(4, 2, **(dict(block_size=2, halo_size=1, dim_head=1) | settings)))
    x = normal((1, *(3, 2, 2)[: block.rank], 4)).requires_grad_()
    names, values = zip(*block.named_parameters(), strict=True)

    def call(x, *weights):
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, *values), fast_mode=True)


def test_zero_boundary_attends_to_the_outside_and_mask_does_not():
    """With equal keys everywhere, attention is even: over the whole window, or over what is inside."""
    x = torch.ones(1, 3, 3, 4, dtype=F64)
    for boundary, share in (("zero", 9 / 25), ("mask", 1.0)):
        block = draw(HaloAttention(4, 1, block_size=3, halo_size=1, dim_head=4, boundary=boundary))
        with torch.no_grad():
            block.q.weight.zero_()  # all logits zero
        values = torch.nn.functional.linear(x, block.kv.weight.flatten(1)[4:])
        torch.testing.assert_close(block(x), share * values)
        assert block.attention_map(x, (1, 1)).sum().item() == pytest.approx(share)


@pytest.mark.parametrize("boundary", ["zero", "mask"])
def test_only_the_window_of_its_block_reaches_a_query(boundary):
    block = draw(HaloAttention(4, 2, block_size=3, halo_size=1, boundary=boundary))
    x = normal((1, 10, 8, 4))
    base = block(x)
    moved = x.clone()
    moved[:, 4, 6] += 1  # block (1, 2); also in the halo of the blocks before it along the second axis, not the first
    changed = (block(moved) - base).abs().amax(-1)[0] > 1e-9
    expected = torch.zeros(10, 8, dtype=torch.bool)
    expected[3:6, 3:8] = True
    assert torch.equal(changed, expected)


def test_attention_map(reference):
    for settings in (dict(), dict(boundary="mask", stride=2), dict(rank=3)):
        block = draw(HaloAttention(4, 2, **(dict(block_size=2, halo_size=1, dim_head=2) | settings)))
        x = normal((2, *(5, 4, 3)[: block.rank], 4))
        _, attention = reference("halo").halo(
            x.numpy(), arrays(block), 2, block.block_size, block.halo_size, 2, block.query_stride, block.boundary
        )
        query = (2, 1, 1)[: block.rank]
        weights = block.attention_map(x, query)
        assert weights.shape == (2, 2, *x.shape[1:-1])
        for image in range(2):
            for head in range(2):
                expected = torch.zeros(x.shape[1:-1], dtype=F64)
                for position, p in attention[image, query, head].items():
                    if position is not None:
                        expected[position] = float(p)
                torch.testing.assert_close(weights[image, head], expected, atol=1e-12, rtol=1e-9)
    with pytest.raises(ValueError, match="index into the map"):
        block.attention_map(x, (5, 0, 0))


def test_half_precision_is_close_and_survives_huge_logits():
    block = HaloAttention(32).eval()
    x = torch.randn(1, 9, 8, 32, generator=torch.Generator().manual_seed(0))
    exact = HaloAttention(32).double().eval()
    for dtype, bound in ((torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        block = block.to(dtype)
        exact.load_state_dict(block.state_dict())
        error = (block(x.to(dtype)).double() - exact(x.to(dtype).double())).abs().max()
        assert error < bound, (dtype, error)
        for boundary in ("zero", "mask"):
            block.boundary = boundary
            assert block(1e3 * x.to(dtype)).isfinite().all()
        block.boundary = "zero"


def test_backward_keeps_nothing_of_the_size_of_the_logits():
    block = HaloAttention(16, 2)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        block(torch.randn(1, 24, 24, 16, requires_grad=True))
    logits = 9 * 2 * 64 * 196
    assert max(sizes) < logits / 3


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(num_heads=5), "num_heads must divide"),
        (dict(rank=1), "rank 2, 3"),
        (dict(block_size=0), "block_size must be an integer of at least 1"),
        (dict(block_size=(8, 8, 8)), "2 of them"),
        (dict(halo_size=-1), "halo_size"),
        (dict(stride=0), "stride"),
        (dict(boundary="reflect"), "'zero', 'mask'"),
        (dict(qk_ratio=0.1, num_heads=16), "qk_ratio"),
        (dict(dim_out=0), "dim_out"),
    ],
)
def test_arguments_are_checked(settings, text):
    with pytest.raises(ValueError, match=text):
        HaloAttention(32, **settings)


def test_inputs_are_checked():
    for shape in ((1, 8, 32), (1, 8, 8, 16), (1, 0, 8, 32)):
        with pytest.raises(ValueError, match="takes"):
            HaloAttention(32)(torch.zeros(shape))


def test_empty_batch_and_non_contiguous_input():
    block = draw(HaloAttention(16, 2))
    assert block(torch.zeros(0, 5, 9, 16, dtype=F64)).shape == (0, 5, 9, 16)
    x = normal((2, 16, 9, 5)).permute(0, 3, 2, 1)
    torch.testing.assert_close(block(x), block(x.contiguous()))
