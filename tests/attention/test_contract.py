"""What every block promises, tested for every entry of both tables, so that a new block is tested before it has tests.

A mixer is built as `X(dim)` with dim 32 or 64, or `X(dim, rank=r)` where it takes a rank, and called with (B, *S, C). A
fusion block is called with (x, skip), both (B, *S, C) at equal resolutions, and returns the fused skip or both streams.
Optional arguments are tried when a constructor has them: anything with "drop" in its name, and `backend`.
"""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from visattn.attention import ATTENTION, FUSION

SIZES = {
    1: [(1,), (2,), (13,), (16,)],
    2: [(1, 1), (1, 7), (5, 3), (8, 8), (11, 13)],
    3: [(1, 1, 1), (3, 1, 2), (2, 5, 3), (4, 4, 4)],
}
PLAIN = {1: (12,), 2: (6, 7), 3: (3, 4, 5)}
CHANNELS_FIRST = ("reverse",)  # it works on a map of logits, in the layout of the head that it belongs to

EVERY = [
    pytest.param(name, rank, id=f"{name}-{rank}d")
    for name, block in sorted((ATTENTION | FUSION).items())
    for rank in block.supported_ranks
    if name not in CHANNELS_FIRST
]
every = pytest.mark.parametrize(("name", "rank"), EVERY)
# Tracing takes seconds; ranks other than 2 follow in the slow run.
planar = pytest.mark.parametrize(
    ("name", "rank"),
    [pytest.param(*c.values, id=c.id, marks=[pytest.mark.slow] if c.values[1] != 2 else []) for c in EVERY],
)


def arguments_of(name):
    return inspect.signature({**ATTENTION, **FUSION}[name]).parameters


def build(name, rank, dim=32, **settings):
    """A block with parameters that are none of them zero, so that every one matters."""
    torch.manual_seed(0)
    if "rank" in arguments_of(name):
        settings["rank"] = rank
    block = {**ATTENTION, **FUSION}[name](dim, **settings)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return block.eval()


def inputs(name, sizes, dim=32, batch=2, dtype=torch.float32, seed=1):
    random = torch.Generator().manual_seed(seed)
    count = 2 if name in FUSION else 1
    return [torch.randn(batch, *sizes, dim, generator=random, dtype=torch.float64).to(dtype) for _ in range(count)]


def outputs(block, *xs):
    """The outputs as a list."""
    out = block(*xs)
    return list(out) if isinstance(out, tuple) else [out]


def total(outs):
    """A number to differentiate, that depends on every element of the outputs in its own way."""
    sums = []
    for out in outs:
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.promote_types(out.dtype, torch.float32))
        sums.append((out * weights.reshape(out.shape)).sum())
    return sum(sums)


def gradients(block, xs):
    """The outputs, and the gradients of inputs and parameters."""
    xs = [x.detach().requires_grad_() for x in xs]
    outs = outputs(block, *xs)
    return [*outs, *torch.autograd.grad(total(outs), [*xs, *block.parameters()])]


def assert_near(found, wanted, share, floor=1e-6):
    """Within `share` of the largest wanted value, or of `floor`."""
    assert torch.isfinite(found).all()
    wanted = wanted.detach().double()
    error, largest = float((found.detach().double() - wanted).abs().max()), float(wanted.abs().max())
    assert error <= share * max(largest, floor)


@every
@pytest.mark.parametrize("dim", [32, 64])
def test_any_size_keeps_the_shape(name, rank, dim):
    block = build(name, rank, dim)
    for sizes in SIZES[rank]:
        xs = inputs(name, sizes, dim)
        for mode in (True, False):
            for out in outputs(block.train(mode), *xs):
                assert out.shape == xs[-1].shape
                assert torch.isfinite(out).all()


@every
def test_no_image_and_no_assumption_on_memory(name, rank):
    block = build(name, rank)
    for mode in (True, False):
        for out in outputs(block.train(mode), *inputs(name, PLAIN[rank], batch=0)):
            assert out.shape == (0, *PLAIN[rank], 32)
    xs = inputs(name, PLAIN[rank])
    strided = [x.movedim(-1, 1).contiguous().movedim(1, -1) for x in xs]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(outputs(block, *strided), outputs(block, *xs), rtol=1e-5, atol=1e-5)


@every
def test_images_do_not_mix_in_evaluation(name, rank):
    block = build(name, rank).double()
    xs = inputs(name, PLAIN[rank], dtype=torch.float64)
    second = [out[1:] for out in outputs(block, *xs)]
    torch.testing.assert_close(second, outputs(block, *(x[1:] for x in xs)), rtol=1e-9, atol=1e-10)


@every
def test_wrong_input_and_settings_are_explained(name, rank):
    block = build(name, rank)
    for wrong in ((*PLAIN[rank], 31), PLAIN[rank], (*PLAIN[rank], 2, 2, 2, 32)):
        xs = [torch.zeros(1, *wrong) for _ in inputs(name, PLAIN[rank])]
        with pytest.raises(ValueError, match=r"\d"):
            block(*xs)
    for dim in (0, -32, 1.5, True):
        with pytest.raises(ValueError, match=r"dim|heads|channels"):
            build(name, rank, dim)
    if "rank" in arguments_of(name):
        with pytest.raises(ValueError, match="rank"):
            build(name, 4)
    if "num_heads" in arguments_of(name):
        for heads in (0,) if "dim_head" in arguments_of(name) else (0, 7):
            with pytest.raises(ValueError, match="num_heads"):
                build(name, rank, num_heads=heads)
    for argument in arguments_of(name):
        if "drop" in argument:
            for value in (-0.1, 1.5):
                with pytest.raises(ValueError, match=argument):
                    build(name, rank, **{argument: value})


@every
def test_gradient_is_right(name, rank):
    block = build(name, rank).double()
    sizes = tuple(min(size, 4) for size in PLAIN[rank])
    xs = [x.requires_grad_() for x in inputs(name, sizes, batch=1, dtype=torch.float64)]
    names, parameters = zip(*block.named_parameters(), strict=True) if list(block.parameters()) else ((), ())

    def run(*values):  # gradcheck takes a tuple of outputs
        state = dict(zip(names, values[len(xs) :], strict=True))
        return torch.func.functional_call(block, state, values[: len(xs)])

    assert torch.autograd.gradcheck(run, (*xs, *parameters), fast_mode=True, atol=1e-4, rtol=1e-3)


@every
def test_every_parameter_gets_a_gradient(name, rank):
    block = build(name, rank).double()
    for sizes in (PLAIN[rank], SIZES[rank][-1]):
        xs = [x.requires_grad_() for x in inputs(name, sizes, dtype=torch.float64)]
        block.zero_grad()
        total(outputs(block, *xs)).backward()
        for key, value in [*enumerate(xs), *block.named_parameters()]:
            assert value.grad is not None, key
            assert torch.isfinite(value.grad).all(), key
            assert str(key).endswith("bias") or value.grad.any(), key


@every
@pytest.mark.parametrize(("kind", "share"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_types_stay_near_float64(name, rank, kind, share):
    """Against the same rounded parameters and inputs in float64, as a share of the largest value."""
    block = build(name, rank).to(kind)
    xs = inputs(name, PLAIN[rank], dtype=kind)
    wanted = outputs(copy.deepcopy(block).double(), *(x.double() for x in xs))
    for out, want in zip(outputs(block, *xs), wanted, strict=True):
        assert out.dtype is kind
        assert_near(out, want, share)


@pytest.mark.parametrize(("name", "rank"), [case for case in EVERY if case.values[1] == 3])
def test_bfloat16_gradients_of_volumes_thinner_than_a_kernel(name, rank):
    """Against the same rounded numbers in float64. PyTorch's own convolution fails here in channels-last memory."""
    block = build(name, rank).to(torch.bfloat16)
    if not any(isinstance(module, nn.Conv3d) and max(module.kernel_size) > 1 for module in block.modules()):
        pytest.skip("no convolution")
    for sizes in ((2, 3, 9), (1, 2, 4)):
        xs = inputs(name, sizes, dtype=torch.bfloat16)
        found = gradients(block, xs)
        wanted = gradients(copy.deepcopy(block).double(), [x.double() for x in xs])
        floor = 2e-2 * max(float(value.detach().abs().max()) for value in wanted)
        for value, want in zip(found, wanted, strict=True):
            assert_near(value, want, 0.25, floor)


@every
def test_autocast(name, rank):
    block = build(name, rank)
    xs = inputs(name, PLAIN[rank])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(block, xs)
    wanted = gradients(block, xs)
    # A gradient that is small beside the others is a difference of large numbers: its own digits are rounded away.
    floor = 1e-3 * max(float(value.detach().abs().max()) for value in wanted)
    for value, want in zip(found, wanted, strict=True):
        assert_near(value, want, 0.1, floor)


@every
def test_checkpointing_changes_nothing(name, rank):
    block = build(name, rank)
    xs = inputs(name, PLAIN[rank])
    wanted = gradients(block, xs)
    xs = [x.requires_grad_() for x in xs]
    outs = outputs(lambda *values: checkpoint(block, *values, use_reentrant=False), *xs)
    found = torch.autograd.grad(total(outs), [*xs, *block.parameters()])
    for value, want in zip([*outs, *found], wanted, strict=True):
        assert torch.equal(value, want)


@every
@pytest.mark.parametrize(("kind", "size"), [(torch.float32, 1e6), (torch.bfloat16, 1e4), (torch.float16, 1e2)])
def test_huge_values_give_numbers(name, rank, kind, size):
    """Scores far beyond the range of exp, and in float16 beyond 65504; so a softmax is not computed in float16."""
    block = build(name, rank).to(kind)
    for out in outputs(block, *(size * x for x in inputs(name, PLAIN[rank], dtype=kind))):
        assert not out.isnan().any()


@every
def test_dropout_in_training_only(name, rank):
    arguments = [argument for argument in arguments_of(name) if "drop" in argument]
    if not arguments:
        pytest.skip("no dropout")
    xs = inputs(name, PLAIN[rank])
    plain = build(name, rank)
    for argument in arguments:
        block = build(name, rank, **{argument: 0.5})
        block.load_state_dict(plain.state_dict())
        torch.testing.assert_close(outputs(block, *xs), outputs(plain, *xs))
        block.train()
        assert not torch.equal(outputs(block, *xs)[0], outputs(block, *xs)[0]), argument


@every
def test_repeatable_bit_for_bit(name, rank):
    block = build(name, rank)
    xs = inputs(name, PLAIN[rank])
    for first, second in zip(gradients(block, xs), gradients(block, xs), strict=True):
        assert torch.equal(first, second)


@every
def test_state_dict_is_all_there_is(name, rank):
    block = build(name, rank)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    buffers = sum(buffer.numel() for buffer in block.buffers())
    outs = [outputs(block, *inputs(name, sizes)) for sizes in SIZES[rank]]
    assert sum(buffer.numel() for buffer in block.buffers()) == buffers
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())
    torch.manual_seed(5)
    other = type(block)(32, **({"rank": rank} if "rank" in arguments_of(name) else {})).eval()
    other.load_state_dict(before)
    for sizes, wanted in zip(SIZES[rank], outs, strict=True):
        for again in (other, copy.deepcopy(block)):
            for out, want in zip(outputs(again, *inputs(name, sizes)), wanted, strict=True):
                assert torch.equal(out, want)


@every
@torch.no_grad()
def test_replicas_of_data_parallel(name, rank):
    """As torch makes them: their weights are attributes, and none is a parameter."""
    block = build(name, rank)
    replicas = {key: module._replicate_for_data_parallel() for key, module in block.named_modules()}
    for key, module in block.named_modules():
        for child in module._modules:
            replicas[key]._modules[child] = replicas[f"{key}.{child}".lstrip(".")]
        for parameter, value in module._parameters.items():
            setattr(replicas[key], parameter, None if value is None else value.clone())
    xs = inputs(name, PLAIN[rank])
    assert not list(replicas[""].parameters())
    assert torch.equal(outputs(replicas[""], *xs)[0], outputs(block, *xs)[0])


@every
@torch.no_grad()
def test_tensors_without_values_leave_nothing_behind(name, rank):
    """Tools that reckon memory run a network so; what it then keeps for later calls would be without values too."""
    sizes = tuple(size + 2 for size in PLAIN[rank])  # of no other test
    block = build(name, rank)
    with FakeTensorMode():
        memo = {id(each): nn.Parameter(torch.empty(each.shape)) for each in block.parameters()}
        memo |= {id(each): torch.empty(each.shape, dtype=each.dtype) for each in block.buffers()}
        fake = copy.deepcopy(block, memo)
        count = 2 if name in FUSION else 1
        fake(*(torch.empty(2, *sizes, 32) for _ in range(count)))
    for out in outputs(block, *inputs(name, sizes)):
        assert type(out) is torch.Tensor
        assert torch.isfinite(out).all()


@every
def test_settings_are_shown(name, rank):
    block = build(name, rank)
    assert type(block).supported_ranks == tuple(sorted(set(type(block).supported_ranks) & {1, 2, 3}))
    shown = block.extra_repr()
    assert "32" in shown
    if "backend" in arguments_of(name):
        assert "backend" in shown


@pytest.mark.parametrize(("name", "rank"), [case for case in EVERY if "backend" in arguments_of(case.values[0])])
def test_backends_agree(name, rank):
    block = build(name, rank, backend="reference").double()
    for backend in ("torch", "auto"):
        other = build(name, rank, backend=backend).double()
        for sizes in SIZES[rank]:
            xs = inputs(name, sizes, dtype=torch.float64)
            for value, wanted in zip(gradients(other, xs), gradients(block, xs), strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-10)


def compiled_matches(name, rank, backend):
    block = build(name, rank)
    xs = inputs(name, PLAIN[rank])
    wanted = gradients(block, xs)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    xs = [x.requires_grad_() for x in xs]
    outs = outputs(compiled, *xs)
    found = torch.autograd.grad(total(outs), [*xs, *block.parameters()])
    torch.compiler.reset()
    for value, want in zip([*outs, *found], wanted, strict=True):
        assert_near(value, want, 1e-4)


@planar
def test_compiles_as_one_graph(name, rank):
    """Traced and differentiated ahead of time; the code that inductor generates from it is for the slow run."""
    compiled_matches(name, rank, "aot_eager")


@every
@pytest.mark.slow  # 10 to 60 seconds each
def test_compiles_with_inductor(name, rank):
    compiled_matches(name, rank, "inductor")


@planar
def test_exports_for_a_range_of_sizes(name, rank):
    """One program for every batch from 1 to 4 and sizes from 9 to 24 (volumes: 9 to 14), with a fixed backend.

    Smaller maps may be smaller than a default window, where a block may take another path.
    """
    if rank == 2 and name in ("bilevel", "grid", "neighborhood") and torch.__version__ < (2, 11):
        pytest.skip("torch 2.10 does not see that the sizes of these blocks' tiles hold for the whole range")
    block = build(name, rank, **({"backend": "torch"} if "backend" in arguments_of(name) else {}))
    most = 14 if rank == 3 else 24
    batch = Dim("batch", min=1, max=4)
    axes = {1 + axis: Dim(f"size{axis}", min=9, max=most) for axis in range(rank)}
    xs = inputs(name, (12, 10, 11)[:rank])
    exported = torch.export.export(block, tuple(xs), dynamic_shapes=tuple({0: batch, **axes} for _ in xs), strict=False)
    run = exported.module()
    for count, sizes in ((1, (9, 9, 9)), (3, (11, 9, 12)), (4, (most, most, 10))):
        xs = inputs(name, sizes[:rank], batch=count)
        torch.testing.assert_close(outputs(run, *xs), outputs(block, *xs), rtol=1e-4, atol=1e-5)


def test_the_tables_name_classes_once():
    for table in (ATTENTION, FUSION):
        assert all(issubclass(block, nn.Module) for block in table.values())
        assert len(set(table.values())) == len(table)
    assert not set(ATTENTION) & set(FUSION)


class Broken(nn.Module):
    """Breaks promises, one for each `fault`, to show that the tests above notice."""

    supported_ranks = (2,)
    fault = ""

    def __init__(self, dim, *, drop=0.0):
        super().__init__()
        if self.fault != "unchecked" and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
            raise ValueError("dim must be 1 or more")
        if self.fault != "unchecked" and not 0 <= drop < 1:
            raise ValueError("drop must be in [0, 1)")
        self.dim, self.drop, self.calls = dim, drop, 0
        self.layer = nn.Linear(dim, dim)
        if self.fault == "unused":
            self.unused = nn.Parameter(torch.zeros(dim))
        self.register_buffer("memory", torch.zeros(1))

    def forward(self, x):
        if x.shape[-1] != self.dim or x.dim() != 4:
            raise ValueError(f"x must be (B, H, W, {self.dim})")
        if self.fault == "even" and x.shape[1] % 2:
            raise RuntimeError("odd size")
        if self.fault == "grows":
            self.memory = torch.zeros(self.memory.numel() + x.shape[1])
        if self.fault == "mixes":
            x = x - x.mean(0)
        out = self.layer(x)
        if self.fault == "half":
            out = out.exp() / out.exp().sum(-1, keepdim=True)
        if self.fault == "detached":
            out = out + (x.detach() ** 2)
        if self.fault == "random":
            out = out + torch.randn_like(out)
        if self.fault == "graph break" and out.sum().item() > 0:
            out = out + 0
        if self.fault == "fixed size":
            out = out + torch.zeros(int(x.shape[1]))[:, None, None].to(out)
            out = out.reshape(x.shape[0], 90, -1).reshape(x.shape) if x.shape[1] * x.shape[2] == 90 else out
        return nn.functional.dropout(out, self.drop, self.training or self.fault == "always drops")

    def extra_repr(self):
        return "" if self.fault == "silent" else f"dim={self.dim}"


@pytest.mark.parametrize(
    ("fault", "test"),
    [
        ("even", lambda: test_any_size_keeps_the_shape("broken", 2, 32)),
        ("unchecked", lambda: test_wrong_input_and_settings_are_explained("broken", 2)),
        ("unused", lambda: test_every_parameter_gets_a_gradient("broken", 2)),
        ("grows", lambda: test_state_dict_is_all_there_is("broken", 2)),
        ("mixes", lambda: test_images_do_not_mix_in_evaluation("broken", 2)),
        ("half", lambda: test_huge_values_give_numbers("broken", 2, torch.float32, 1e6)),
        ("detached", lambda: test_gradient_is_right("broken", 2)),
        ("random", lambda: test_repeatable_bit_for_bit("broken", 2)),
        ("graph break", lambda: test_compiles_as_one_graph("broken", 2)),
        ("always drops", lambda: test_dropout_in_training_only("broken", 2)),
        ("fixed size", lambda: test_exports_for_a_range_of_sizes("broken", 2)),
        ("silent", lambda: test_settings_are_shown("broken", 2)),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_a_broken_promise_is_noticed(monkeypatch, fault, test):
    monkeypatch.setitem(ATTENTION, "broken", Broken)
    monkeypatch.setattr(Broken, "fault", "")
    test()
    monkeypatch.setattr(Broken, "fault", fault)
    with pytest.raises(BaseException):  # noqa: B017, PT011 - an assertion, or whatever the fault raises
        test()
