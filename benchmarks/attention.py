"""Times the attention blocks against their baselines on one core, and measures the memory they take.

    python benchmarks/attention.py                  # every case
    python benchmarks/attention.py neighborhood halo --runs 31

Cases come from `attention_cases/*.py`. Each module has CASES, a list of tuples

    (name, ours, baseline, make_inputs, floors[, extra])

`ours` and `baseline` build modules, `make_inputs` the tensors that both are called with; `floors` are the least ratios
of the baseline's time to ours, forward and forward with backward. Outputs must be equal, unless `extra` (a dict) names
under "reference" another builder to compare ours with, for a baseline that computes something else. "work" in it is the
forward pass's (floating-point operations, bytes moved, exponentials), for the ratio to what the machine could do.

Times are thread CPU time, medians of interleaved runs, so that other processes and frequency changes hit both alike.
Peak memory is what PyTorch's allocator hands out during a call, as a multiple of the inputs' bytes.
"""

import argparse
import datetime
import importlib.util
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

CASES = Path(__file__).resolve().parent / "attention_cases"


def load(folder: Path, name: str) -> ModuleType:
    """The module `name` of a folder of cases."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(names: list[str], folder: Path = CASES) -> Iterator[tuple]:
    """Every case of the modules named, or of all."""
    known = sorted(path.stem for path in folder.glob("*.py"))
    for name in names or known:
        if name not in known:
            sys.exit(f"no cases named {name!r}; there are {', '.join(known)}")
        yield from load(folder, name).CASES


def medians(functions: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Milliseconds of thread CPU time of each function, run in turn."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
        function()
    for _ in range(runs):
        for name, function in functions.items():
            start = time.thread_time()
            function()
            taken[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def peak(function: Callable[[], object], inputs: tuple[Tensor, ...]) -> float:
    """Most bytes held at once during a call, in multiples of the inputs' bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = function()
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most / sum(x.numel() * x.element_size() for x in inputs)


def forward(block: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call without gradients, in evaluation."""

    def run() -> object:
        with torch.no_grad():
            return block.eval()(*inputs)

    return run


def training(block: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """A call with backward to inputs and parameters, in training."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    weight = torch.randn_like(block.eval()(*inputs).detach())

    def run() -> object:
        out = block.train()(*leaves)
        wanted = [*leaves, *(p for p in block.parameters() if p.requires_grad)]
        return torch.autograd.grad(out, wanted, weight, allow_unused=True)

    return run


def rates() -> tuple[float, float, float]:
    """What this core does in a second: operations in a matrix product, bytes copied, exponentials."""
    a, b = torch.randn(2, 1024, 1024)
    x, y = torch.randn(2, 1 << 24)
    z = torch.randn(1 << 18)
    e = torch.empty_like(z)
    taken = medians({"product": lambda: a @ b, "copy": lambda: y.copy_(x), "exp": lambda: torch.exp(z, out=e)}, 7)
    return 2e3 * 1024**3 / taken["product"], 8e3 * x.numel() / taken["copy"], 1e3 * z.numel() / taken["exp"]


def check(case: tuple) -> None:
    """Ours must give what the baseline, or the reference, gives."""
    name, ours, baseline, make_inputs = case[:4]
    extra = case[5] if len(case) > 5 else {}
    inputs = make_inputs()
    with torch.no_grad():
        out, wanted = ours().eval()(*inputs), extra.get("reference", baseline)().eval()(*inputs)
    difference = float((out - wanted).abs().max() / wanted.abs().max())
    if not difference < 1e-4:
        sys.exit(f"{name}: outputs differ by {difference:.1e} of the largest value")


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="modules of attention_cases; all of them if none is named")
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    operations, copied, exponentials = rates()
    print(f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, one thread, float32")
    print(f"{operations / 1e9:.0f} GFLOP/s, copy {copied / 1e9:.1f} GB/s, {exponentials / 1e9:.1f}e9 exp/s\n")
    memory = "peak fwd, fwd+bwd (x inputs) | " if arguments.memory else ""
    print(f"| case | ms fwd | ms fwd+bwd | baseline ms | ratio fwd (floor) | ratio fwd+bwd (floor) | {memory}x work |")
    print("|---|---|---|---|---|---|" + ("---|" if memory else "") + "---|")
    missed = 0
    for case in cases(arguments.names):
        name, ours, baseline, make_inputs, floors = case[:5]
        work = case[5].get("work") if len(case) > 5 else None
        check(case)
        inputs, mine, theirs = make_inputs(), ours(), baseline()
        taken = medians({"ours": forward(mine, inputs), "baseline": forward(theirs, inputs)}, arguments.runs)
        both = medians({"ours": training(mine, inputs), "baseline": training(theirs, inputs)}, arguments.runs)
        ratios = taken["baseline"] / taken["ours"], both["baseline"] / both["ours"]
        marks = ["" if ratio >= floor else " **missed**" for ratio, floor in zip(ratios, floors, strict=True)]
        missed += sum(bool(mark) for mark in marks)
        cells = [
            name,
            f"{taken['ours']:.2f}",
            f"{both['ours']:.2f}",
            f"{taken['baseline']:.1f}, {both['baseline']:.1f}",
            *(f"{r:.2f}x ({f:.2f}){m}" for r, f, m in zip(ratios, floors, marks, strict=True)),
        ]
        if arguments.memory:
            cells.append(f"{peak(forward(mine, inputs), inputs):.1f}, {peak(training(mine, inputs), inputs):.1f}")
        floor = 0.0
        if work:
            floor = 1e3 * (max(work[0] / operations, work[1] / copied) + work[2] / exponentials)
        cells.append(f"{taken['ours'] / floor:.1f}" if floor else "")
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"\n{missed} floors missed" if missed else "\nevery floor is met")


if __name__ == "__main__":
    main()
