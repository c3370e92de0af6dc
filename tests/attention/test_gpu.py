"""Blocks on a GPU: the same numbers as on the CPU in float64, forward and backward.

python -m pytest -m gpu tests/attention                     # all
python -m pytest -m "gpu and not slow" tests/attention      # without compilation
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from visattn.attention import neighborhood_attention
from visattn.attention._backend import natten_module

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def _load(name):
    spec = importlib.util.spec_from_file_location(f"visattn_{name}_on_gpu", Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


contract = _load("test_contract")
every = contract.every
near = contract.assert_near


@pytest.fixture(autouse=True)
def full_precision():
    """No TF32 in convolutions, which has ten bits; products have none by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def results(block, xs):
    """Outputs, and gradients of inputs and parameters, of a sum that depends on every element in its own way."""
    xs = [x.detach().requires_grad_() for x in xs]
    outs = contract.outputs(block, *xs)
    loss = torch.zeros((), dtype=torch.float64, device=xs[0].device)
    for out in outs:
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device)
        loss = loss + (out.double() * weights.reshape(out.shape)).sum()
    return [*outs, *torch.autograd.grad(loss, [*xs, *block.parameters()])]


def wanted(block, xs):
    """The same on the CPU in float64, of the same numbers."""
    return results(copy.deepcopy(block).double(), [x.double() for x in xs])


def compare(found, want, share, floor):
    """Every result within `share` of its largest value, or of a `floor`, itself a share of the largest of all."""
    largest = max(float(value.detach().abs().max()) for value in want)
    for value, other in zip(found, want, strict=True):
        near(value.detach().cpu(), other, share, floor * largest)


@every
def test_single_precision(name, rank):
    block = contract.build(name, rank)
    for sizes in (contract.PLAIN[rank], contract.SIZES[rank][-1], contract.SIZES[rank][0]):
        xs = contract.inputs(name, sizes)
        found = results(copy.deepcopy(block).to(DEVICE), [x.to(DEVICE) for x in xs])
        assert all(value.device.type == DEVICE for value in found)
        compare(found, wanted(block, xs), 2e-4, 1e-3)


@every
@pytest.mark.parametrize(("kind", "share"), [(torch.bfloat16, 0.06), (torch.float16, 0.02)])
def test_half_precision(name, rank, kind, share):
    block = contract.build(name, rank).to(kind)
    xs = contract.inputs(name, contract.PLAIN[rank], dtype=kind)
    found = results(copy.deepcopy(block).to(DEVICE), [x.to(DEVICE) for x in xs])
    want = wanted(block, xs)
    count = len(contract.outputs(block.float(), *(x.float() for x in xs)))
    assert all(value.dtype is kind for value in found)
    for value, other in zip(found[:count], want[:count], strict=True):
        near(value.detach().cpu(), other, share)
    compare(found[count:], want[count:], 0.25, 0.02)


@every
def test_autocast(name, rank):
    block = contract.build(name, rank)
    xs = contract.inputs(name, contract.PLAIN[rank])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = results(copy.deepcopy(block).to(DEVICE), [x.to(DEVICE) for x in xs])
    compare(found, wanted(block, xs), 0.25, 0.02)


@every
@pytest.mark.parametrize(("kind", "size"), [(torch.float32, 1e6), (torch.bfloat16, 1e4), (torch.float16, 1e2)])
def test_huge_values_give_numbers(name, rank, kind, size):
    block = contract.build(name, rank).to(DEVICE, kind)
    xs = contract.inputs(name, contract.PLAIN[rank], dtype=kind)
    assert not any(out.isnan().any() for out in contract.outputs(block, *(size * x.to(DEVICE) for x in xs)))


@every
def test_any_memory_layout_and_no_image(name, rank):
    block = contract.build(name, rank).to(DEVICE)
    xs = [x.to(DEVICE) for x in contract.inputs(name, contract.PLAIN[rank])]
    strided = [x.movedim(-1, 1).contiguous().movedim(1, -1) for x in xs]
    compare(results(block, strided), [value.cpu() for value in results(block, xs)], 1e-4, 1e-3)
    for out in contract.outputs(block, *(x[:0] for x in xs)):
        assert out.shape == (0, *contract.PLAIN[rank], 32)


@contract.planar
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # full precision is meant
def test_compiles(name, rank):
    block = contract.build(name, rank).to(DEVICE)
    xs = [x.to(DEVICE) for x in contract.inputs(name, contract.PLAIN[rank])]
    want = [value.cpu() for value in results(block, xs)]
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    compare(results(compiled, xs), want, 5e-4, 1e-3)
    torch.compiler.reset()


SETTINGS = [  # size, kernel, stride, dilation, causal, query heads, key heads
    ((40,), (7,), (1,), (1,), (False,), 4, 4),
    ((33,), (6,), (4,), (3,), (True,), 4, 2),
    ((56, 56), (7, 7), (1, 1), (1, 1), (False, False), 2, 2),
    ((19, 30), (4, 9), (2, 3), (3, 2), (True, False), 6, 2),
    ((16, 24), (8, 8), (8, 8), (1, 1), (False, False), 2, 1),
    ((9, 10, 12), (3, 5, 4), (1, 2, 4), (2, 1, 3), (False, True, False), 2, 2),
    ((7, 8, 9), (7, 7, 7), (1, 1, 1), (1, 1, 1), (False, False, False), 3, 3),
]
BACKENDS = [
    "torch",
    "auto",
    pytest.param("natten", marks=pytest.mark.skipif(natten_module() is None, reason="no natten")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "x".join(map(str, setting[0])))
@pytest.mark.parametrize(("kind", "share"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_neighbourhood_attention(setting, backend, kind, share):
    size, kernel, stride, dilation, causal, heads, groups = setting
    random = torch.Generator().manual_seed(0)
    shapes = [(2, *size, count, 16) for count in (heads, groups, groups)]
    tensors = [torch.randn(shape, generator=random).to(kind) for shape in shapes]
    grad = torch.randn(shapes[0], generator=random)

    def run(tensors, backend):
        leaves = [each.detach().requires_grad_() for each in tensors]
        out = neighborhood_attention(*leaves, kernel, stride, dilation, causal, backend=backend)
        with torch.no_grad():
            _, lse = neighborhood_attention(*leaves, kernel, stride, dilation, causal, backend=backend, return_lse=True)
        return [out, lse, *torch.autograd.grad(out, leaves, grad.to(out))]

    if backend != "torch":
        share = max(share, 5e-3)  # natten's products of float32 may be TF32
    want = run([each.double() for each in tensors], "reference")
    for value, other in zip(run([each.to(DEVICE) for each in tensors], backend), want, strict=True):
        near(value.detach().cpu(), other, share)


def test_a_position_bias_on_the_gpu():
    x = [torch.randn(1, 15, 18, 2, 16, dtype=torch.float64) for _ in range(3)]
    rpb = torch.randn(2, 13, 9, dtype=torch.float64)
    want = neighborhood_attention(*x, (7, 5), rpb=rpb, backend="reference")
    found = neighborhood_attention(*(each.to(DEVICE).float() for each in x), (7, 5), rpb=rpb.to(DEVICE).float())
    near(found.cpu(), want, 1e-5)


def test_neighbourhood_attention_is_captured_in_a_graph():
    """No step waits for the device, so a CUDA graph can hold it."""
    x = [torch.randn(1, 28, 28, 2, 32, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]

    def step():
        out = neighborhood_attention(*x, 7, backend="torch")
        return out.detach(), *torch.autograd.grad(out, x, torch.ones_like(out))  # no graph of another stream lives on

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            want = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for value, other in zip(found, want, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-2, atol=1e-2)
