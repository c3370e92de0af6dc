"""Times backbones on one core: images a second forward and in a training step, peak memory, floating-point operations.

    python benchmarks/backbones.py                              # every family, and timm's networks of like size beside
    python benchmarks/backbones.py biformer --batch 4 --runs 9

Families come from `backbone_cases/*.py`. Each module has CASES, a list of tuples

    (name, arguments, official, floors)

`name` is registered with timm and takes `arguments`. `official` is a function that builds the official formulation
around ours, a network of equal numbers that is given our weights, or None where there is none; `floors` are the least
ratios of its time to ours, forward and training step: 0.95, which is noise, where both do the same work.

Times are thread CPU time, medians of interleaved runs, so that other processes and frequency changes hit both alike.
Peak memory is what PyTorch's allocator hands out during a call, beside weights. Operations are those of products and
convolutions, a multiply-add as two.
"""

import argparse
import copy
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


def prepare(model: nn.Module) -> None:
    """Move norms and biases off their first values, so that no branch starts as nothing and every part counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    found, wanted = found.detach().float(), wanted.detach().float()
    return float((found - wanted).abs().max() / wanted.abs().max())


def swapped(model: nn.Module, formulations: dict[type[nn.Module], Callable[[nn.Module], nn.Module]]) -> nn.Module:
    """A copy of `model` with other modules for those of the classes named, made from these and with their weights."""
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if type(module) in formulations:
            other = formulations[type(module)](module)
            other.load_state_dict(module.state_dict())
            copied.set_submodule(name, other)
    return copied


def check(name: str, ours: nn.Module, official: nn.Module, x: Tensor) -> None:
    """Both must compute the same."""
    with torch.no_grad():
        difference = apart(ours.eval()(x), official.eval()(x))
    if not difference < 1e-4:
        sys.exit(f"{name}: outputs differ by {difference:.1e} of the largest value")


class Table:
    """Measures networks and prints a line of each.

    Args:
        batch: Images.
        size: Their side in pixels; None: what a network is made for.
        runs: Of a median.
    """

    def __init__(self, batch: int, size: int | None, runs: int) -> None:
        self.batch, self.size, self.runs = batch, size, runs
        self.anchor: list[float] = []  # milliseconds of an image's forward pass and step of the first network
        self.missed = 0

    def row(self, name: str, options: dict, make: Callable[[nn.Module], nn.Module] | None, floors: tuple) -> None:
        """Measure and print one line; `make` gives the official formulation."""
        model = timm.create_model(name, **options)
        prepare(model)
        size = self.size or model.default_cfg["input_size"][-1]
        x = torch.randn(self.batch, 3, size, size)
        networks = {"ours": model}
        if make is not None:
            networks["official"] = make(model)
            check(name, model, networks["official"], x)
        images, beside, compared, taken = [], [], [], []
        for kind, floor in zip((forward, training), floors, strict=True):
            calls = {key: kind(each, (x,)) for key, each in networks.items()}
            times = medians(calls, self.runs)
            taken.append(times["ours"])
            images.append(f"{1e3 * self.batch / times['ours']:.2f}, {peak(calls['ours'], (x,)) * x.nbytes / 2**20:.0f}")
            ratio = times.get("official", 0) / times["ours"]
            self.missed += make is not None and ratio < floor
            missed = " **missed**" if ratio < floor else ""
            compared.append("" if make is None else f"{ratio:.2f}x ({floor:.2f}){missed}")
        self.anchor = self.anchor or taken
        beside = [f"{anchor / time:.2f}" for anchor, time in zip(self.anchor, taken, strict=True)]
        parameters = sum(each.numel() for each in model.parameters()) / 1e6
        facts = [name, str(size), f"{parameters:.1f}", f"{operations(model, x) / 1e9:.1f}"]
        print("| " + " | ".join([*facts, *images, *beside, *compared]) + " |", flush=True)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="modules of backbone_cases; all of them if none is named")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, help="side of the images in pixels; default: what a network is made for")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="names of networks: leave out the others")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{datetime.date.today()}, {platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, "
        f"visattn {visattn.__version__}, one thread, float32, batch {arguments.batch}\n"
    )
    head = ["network", "pixels", "M params", "GFLOP", "fwd images/s, MiB", "step images/s, MiB"]
    head += [f"fwd / {BESIDE[0]}", f"step / {BESIDE[0]}", "fwd / official (floor)", "step / official (floor)"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    table = Table(arguments.batch, arguments.size, arguments.runs)
    for name in BESIDE:
        table.row(name, {}, None, (0.0, 0.0))
    for case in cases(arguments.families, CASES):
        if arguments.only is None or case[0] in arguments.only:
            table.row(*case)
    print(f"\n{table.missed} floors missed" if table.missed else "\nevery floor is met")


if __name__ == "__main__":
    main()
