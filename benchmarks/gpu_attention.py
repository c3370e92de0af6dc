"""Times neighbourhood attention on a GPU against dense attention over the whole map, and against natten if it is there.

    python benchmarks/gpu_attention.py                    # prints two tables in Markdown
    python benchmarks/gpu_attention.py --runs 100 --cases 3

Each case is measured as single calls, which contain what the launches cost, and as replays of a CUDA graph, which do
not. Times are medians between CUDA events, of calls in turn, so that changes of the clock hit all alike. Before that,
one head of one image is compared with attention under a mask in float32, forward and for small maps backward too, and
natten's whole output with ours. What cannot run, or cannot be captured, is said in the table's cell.
"""

import argparse
import datetime
import importlib.util
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visattn.attention import neighborhood_attention, simulate

# size, kernel, batch, heads, channels of a head
CASES = [
    ((56, 56), 7, 8, 4, 32),
    ((64, 64), 7, 16, 4, 32),
    ((128, 128), 13, 4, 8, 64),
    ((256, 256), 31, 1, 8, 64),
    ((32, 32, 32), 7, 2, 4, 32),
]
CHUNK, SMALL = 1024, 4096  # rows of the mask at a time; positions up to which gradients are compared
Call = Callable[[], object]


def torch_tiles(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    """Ours, in PyTorch."""
    return neighborhood_attention(q, k, v, kernel, backend="torch")


def natten_library(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    """Ours through natten's library."""
    return neighborhood_attention(q, k, v, kernel, backend="natten")


def dense(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    """Attention of all to all, which computes something else: what a model would use instead."""
    q, k, v = (each.flatten(1, -3).transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def masked(q: Tensor, k: Tensor, v: Tensor, size: Sequence[int], kernel: int) -> Tensor:
    """The definition for one head (N, D): attention under a mask, some rows at a time."""
    counted = simulate(size, kernel)
    lines = [
        torch.stack([counted.line(axis, at) for at in range(length)]).to(q.device) for axis, length in enumerate(size)
    ]
    outs = []
    for first in range(0, len(q), CHUNK):
        row = torch.arange(first, min(first + CHUNK, len(q)), device=q.device)
        seen, rest = torch.ones(len(row), 1, dtype=torch.bool, device=q.device), math.prod(size)
        for length, line in zip(size, lines, strict=True):
            rest //= length
            seen = (seen[:, :, None] & line[row // rest % length][:, None]).flatten(1)
        logits = (q[row] @ k.T * q.shape[1] ** -0.5).masked_fill(~seen, -math.inf)
        outs.append(logits.softmax(-1) @ v)
    return torch.cat(outs)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).abs().max() / wanted.abs().max())


def check(size: Sequence[int], kernel: int, heads: int, width: int, others: Sequence[Callable[..., Tensor]]) -> str:
    """Compares ours and `others` with the definition; returns what was compared, or stops."""
    random = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(1, *size, heads, width, device="cuda", generator=random) for _ in range(3)]
    whole = [each.bfloat16() for each in tensors]
    small = math.prod(size) <= SMALL
    first = [each.flatten(1, -3)[0, :, 0].float().requires_grad_(small) for each in whole]
    wanted = masked(*first, size, kernel)
    report = []
    for function in (torch_tiles, *others):
        leaves = [each.detach().requires_grad_(small) for each in whole]
        out = function(*leaves, kernel)
        errors = [apart(out.flatten(1, -3)[0, :, 0], wanted)]
        if small:
            grad = torch.randn_like(wanted, dtype=torch.bfloat16)
            full = torch.zeros_like(out)
            full.flatten(1, -3)[0, :, 0] = grad
            theirs = torch.autograd.grad(wanted, first, grad.float(), retain_graph=True)
            ours = torch.autograd.grad(out, leaves, full)
            errors += [apart(a.flatten(1, -3)[0, :, 0], b) for a, b in zip(ours, theirs, strict=True)]
        if not max(errors) < 0.03:
            sys.exit(f"{function.__name__} at {tuple(size)}: off by {', '.join(f'{each:.1e}' for each in errors)}")
        report.append(f"{function.__name__} {max(errors):.0e}")
    return ", ".join(report)


def calls(function: Callable[..., Tensor], tensors: Sequence[Tensor], kernel: int, backward: bool) -> Call:
    """A call, with backward to the inputs if asked."""
    leaves = [each.detach().requires_grad_(backward) for each in tensors]
    grad = torch.randn_like(function(*leaves, kernel))

    def run() -> object:
        out = function(*leaves, kernel)
        return torch.autograd.grad(out, leaves, grad) if backward else out

    return run


def captured(call: Call) -> Call:
    """Replays `call` from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()
    return lambda: (graph.replay(), kept, call)  # what the call reads must live as long as its graph


def medians(functions: dict[str, Call], runs: int) -> dict[str, float]:
    """Microseconds of each, between events around every call, in turn."""
    for function in itertools.chain(*[functions.values()] * 5):
        function()
    torch.cuda.synchronize()
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            function()
            end.record()
            end.synchronize()
            taken[name].append(1e3 * start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in taken.items()}


def measure(
    functions: dict[str, Callable[..., Tensor]], tensors: Sequence[Tensor], kernel: int, runs: int, graph: bool
) -> dict[str, list[float | str]]:
    """Forward, and forward with backward, of each function in microseconds; or why there is no number."""
    found: dict[str, list[float | str]] = {name: [] for name in functions}
    for backward in (False, True):
        ready: dict[str, Call] = {}
        for name, function in functions.items():
            try:
                call = calls(function, tensors, kernel, backward)
                ready[name] = captured(call) if graph else call
            except (RuntimeError, NotImplementedError, ValueError) as error:
                torch.cuda.synchronize()
                found[name].append(f"{type(error).__name__}")
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
        for name, value in medians(ready, runs).items():
            found[name].append(value)
    return found


def cells(taken: dict[str, list[float | str]]) -> list[str]:
    """Times of every function, then dense attention's over those of the others."""

    def text(value: float | str) -> str:
        return f"{value:.0f}" if isinstance(value, float) else value

    row = [" \\| ".join(text(value) for value in values) for values in taken.values()]
    for name, values in taken.items():
        if name != "dense":
            pairs = zip(taken["dense"], values, strict=True)
            ratios = [f"{a / b:.2f}x" if isinstance(a, float) and isinstance(b, float) else "-" for a, b in pairs]
            row.append(" \\| ".join(ratios))
    return row


def main() -> None:
    """Checks, measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("a CUDA device is needed")
    functions: dict[str, Callable[..., Tensor]] = {"torch": torch_tiles}
    if importlib.util.find_spec("natten") is not None:
        import natten

        if getattr(natten, "HAS_LIBNATTEN", False):
            functions["natten"] = natten_library
        else:
            print("natten is installed without its library (HAS_LIBNATTEN is False): left out", file=sys.stderr)
    functions["dense"] = dense
    print(f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    print("Microseconds, forward \\| forward with backward; ratios are dense attention's time over this.\n")
    others = [function for name, function in functions.items() if name == "natten"]
    for graph in (False, True):
        print("CUDA graph replays\n" if graph else "Single calls\n")
        head = [*functions, *(f"{name}: ratio" for name in functions if name != "dense")]
        print(f"| case | {' | '.join(head)} |" + ("" if graph else " compared with the definition |"))
        print("|" + "---|" * (len(head) + 1 + (not graph)))
        for size, kernel, batch, heads, width in CASES[: arguments.cases]:
            tensors = [torch.randn(batch, *size, heads, width, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
            compared = [] if graph else [check(size, kernel, heads, width, others)]
            row = cells(measure(functions, tensors, kernel, arguments.runs, graph))
            name = f"{'x'.join(map(str, size))} k{kernel}, B{batch}, {heads} heads d{width}"
            print(f"| {' | '.join([name, *row, *compared])} |", flush=True)
        print()


if __name__ == "__main__":
    main()
