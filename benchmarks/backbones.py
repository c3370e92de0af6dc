"""Times backbones on one core: images a second forward and in a training step, peak memory, floating-point operations.

    python benchmarks/backbones.py                              # every family, and timm's networks of like size beside
    python benchmarks/backbones.py biformer --batch 4 --runs 9

Families come from `backbone_cases/*.py`. Each module has CASES, a list of tuples

    (name, arguments, official, floors)

`name` is registered with timm and takes `arguments`. `official` is a function that builds the official formulation
around ours, a network of equal numbers that is given our weights, or None where no block differs; `floors` are the
least ratios of its time to ours, forward and training step.

Times are thread CPU time, medians of interleaved runs, so that other processes and frequency changes hit both alike.
Peak memory is what PyTorch's allocator hands out during a call, beside weights. Operations are those of products and
convolutions, a multiply-add as two.
"""

import argparse
import datetime
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from attention import cases, forward, medians, peak
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import visattn

CASES = Path(__file__).resolve().parent / "backbone_cases"
BESIDE = ("resnet50", "swin_tiny_patch4_window7_224", "convnext_tiny")
Call = Callable[[], object]


def training(model: nn.Module, inputs: tuple[Tensor]) -> Call:
    """Loss, gradients and a step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    (x,) = inputs
    labels = torch.zeros(len(x), dtype=torch.long)

    def run() -> object:
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        return optimizer.step()

    return run


def operations(model: nn.Module, x: Tensor) -> float:
    """Floating-point operations of one image's forward pass."""
    with FlopCounterMode(display=False) as counter:
        forward(model, (x[:1],))()
    return counter.get_total_flops()


def check(name: str, ours: nn.Module, official: nn.Module, x: Tensor) -> None:
    """Both must compute the same."""
    with torch.no_grad():
        wanted, found = official.eval()(x), ours.eval()(x)
    difference = float((wanted - found).abs().max() / wanted.abs().max())
    if not difference < 1e-4:
        sys.exit(f"{name}: outputs differ by {difference:.1e} of the largest value")


def row(name: str, model: nn.Module, official: nn.Module | None, floors: tuple, x: Tensor, runs: int) -> int:
    """Measure and print one line; the number of floors missed."""
    networks = {"ours": model} | ({} if official is None else {"official": official})
    cells, ratios = [], []
    for kind in (forward, training):
        calls = {key: kind(each, (x,)) for key, each in networks.items()}
        taken = medians(calls, runs)
        ratios.append(taken.get("official", 0) / taken["ours"])
        cells.append(f"{1e3 * len(x) / taken['ours']:.2f}, {peak(calls['ours'], (x,)) * x.nbytes / 2**20:.0f}")
    missed = official is not None and sum(r < f for r, f in zip(ratios, floors, strict=True))
    compared = [
        "" if official is None else f"{ratio:.2f}x ({floor:.2f}){' **missed**' if ratio < floor else ''}"
        for ratio, floor in zip(ratios, floors, strict=True)
    ]
    parameters = sum(each.numel() for each in model.parameters()) / 1e6
    facts = [name, f"{parameters:.1f}", f"{operations(model, x) / 1e9:.1f}"]
    print("| " + " | ".join([*facts, *cells, *compared]) + " |", flush=True)
    return int(missed)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="modules of backbone_cases; all of them if none is named")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--no-beside", action="store_true", help="leave timm's networks out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    print(
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"visattn {visattn.__version__}, one thread, float32, batch {arguments.batch}, {arguments.size} pixels\n"
    )
    print("| network | M params | GFLOP | fwd images/s, MiB | step images/s, MiB | ratio fwd (floor) | step (floor) |")
    print("|---|---|---|---|---|---|---|")
    missed = 0
    for name, options, official, floors in cases(arguments.families, CASES):
        model = timm.create_model(name, **options)
        theirs = None if official is None else official(model)
        if theirs is not None:
            check(name, model, theirs, x)
        missed += row(name, model, theirs, floors, x, arguments.runs)
    for name in () if arguments.no_beside else BESIDE:
        row(name, timm.create_model(name), None, (0.0, 0.0), x, arguments.runs)
    print(f"\n{missed} floors missed" if missed else "\nevery floor is met")


if __name__ == "__main__":
    main()
