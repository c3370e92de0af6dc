"""Compares the memory that `visattn models NAME --size` computes with what a GPU takes.

    python benchmarks/gpu_memory.py [--output DIR] [--only NAME ...]        (about a minute on one GPU)

Each network makes three steps with AdamW, in bf16-mixed and in float32, and predicts one image in float32. Taken is
`torch.cuda.max_memory_allocated` of the last step. Beside it stands what of it was a kernel's workspace: what lived, at
the moment when most did, without a line of Python that asks for a tensor of its own size; by its largest entries.
DIR gets memory.json and memory.md.
"""

import argparse
import gc
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from visattn.networks import create_model, prediction
from visattn.summary import summarise

DINA: list[Any] = [
    {"name": "neighborhood", "kernel_size": 5},
    {"name": "neighborhood", "kernel_size": 5, "dilation": 2},
]
MAXVIT: list[Any] = [{"name": "window", "window_size": 5}, {"name": "grid", "grid_size": 5}]
VOLUMES: dict[str, Any] = {"name": "unet", "dims": 3, "backbone": "va_pyramid3d_small", "classes": 3}
# Network, and the shape of a batch. The first and the sixth to the eighth are those of docs/benchmarks.md.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "unet biformer_tiny, gates": (
        {"name": "unet", "backbone": "va_biformer_tiny", "skip": "gate"},
        (16, 3, 352, 352),
    ),
    "unet pyramid_small, neighborhood": (
        {"name": "unet", "backbone": "va_pyramid_small", "decoder": "residual"},
        (16, 3, 352, 352),
    ),
    "att_swin_unet": ({"name": "att_swin_unet"}, (24, 3, 224, 224)),
    "pranet res2net50d": ({"name": "pranet"}, (16, 3, 352, 352)),
    "unet halo decoder": (
        {"name": "unet", "backbone": "resnet18", "decoder": {"name": "halo", "block_size": 8, "halo_size": 3}},
        (16, 3, 256, 256),
    ),
    "unet3d": ({"name": "unet3d", "filters": [32, 64, 128, 256], "classes": 3}, (8, 1, 40, 56, 40)),
    "unet 3-D, NA and DiNA": (
        {**VOLUMES, "backbone_args": {"depths": [2, 2, 4, 2], "attention": [DINA, DINA, [*DINA, *DINA], DINA[:1] * 2]}},
        (8, 1, 40, 56, 40),
    ),
    "unet 3-D, window and grid": (
        {**VOLUMES, "backbone_args": {"depths": [2, 2, 4, 2], "attention": [MAXVIT, MAXVIT, [*MAXVIT] * 2, MAXVIT]}},
        (8, 1, 40, 56, 40),
    ),
}
MIB = 2**20


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, mixed: bool) -> None:
    """A step of training, as `visattn fit` makes it."""
    optimizer.zero_grad()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=mixed):
        output = net(x)
    maps = [output] if isinstance(output, torch.Tensor) else list(output)
    sum(each.float().square().mean() for each in maps).backward()
    optimizer.step()


def taken(net: torch.nn.Module, x: torch.Tensor, mixed: bool) -> tuple[int, int, list[str]]:
    """Peak of a step in bytes, what lives before it, and what was largest at the moment of the peak."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    for _ in range(2):
        step(net, optimizer, x, mixed)
    optimizer.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(net, optimizer, x, mixed)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=400_000)
    step(net, optimizer, x, mixed)
    torch.cuda.synchronize()
    trace = torch.cuda.memory._snapshot()["device_traces"][0]
    torch.cuda.memory._record_memory_history(enabled=None)
    return peak, before, largest(trace)


def largest(trace: Sequence[dict[str, Any]]) -> list[str]:
    """The ten largest pieces alive at the peak of what was recorded, with the lines that asked for them."""
    live: dict[int, dict[str, Any]] = {}
    now = most = 0
    at_peak: list[dict[str, Any]] = []
    for number in (0, 1):  # find the peak, then see who was there
        live, now = {}, 0
        for event in trace:
            if event["action"] == "alloc":
                live[event["addr"]] = event
                now += event["size"]
                if number == 1 and now == most:
                    at_peak = list(live.values())
                    break
                most = max(most, now) if number == 0 else most
            elif event["action"] == "free_completed" and event["addr"] in live:
                now -= live.pop(event["addr"])["size"]
    sums: dict[str, list[int]] = {}
    for event in at_peak:
        frames = [
            f"{Path(each['filename']).name}:{each['line']} {each['name']}"
            for each in event.get("frames", [])
            if each["filename"].endswith(".py")
        ]
        entry = sums.setdefault(" < ".join(frames[:3]) or "(no Python)", [0, 0])
        entry[0] += event["size"]
        entry[1] += 1
    rows = sorted(sums.items(), key=lambda item: -item[1][0])[:10]
    return [f"{size / MIB:8.1f} MiB in {number:4}  {name}" for name, (size, number) in rows]


def predicted(net: torch.nn.Module, shape: Sequence[int]) -> dict[str, float]:
    """What the summary computes for the same batch, in bytes."""
    found = summarise(net, shape[1:], shape[0])
    return {
        "bf16-mixed": found.training_memory(mixed=True),
        "32-true": found.training_memory(),
        "predict": found.inference_memory,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    rows = []
    for name in options.only:
        config, shape = CASES[name]
        torch.manual_seed(0)
        net = create_model(in_channels=shape[1], **config)
        expected = predicted(net, shape)
        print(
            f"{name} {shape}: computed " + ", ".join(f"{k} {v / MIB:.0f} MiB" for k, v in expected.items()), flush=True
        )
        if not torch.cuda.is_available():
            continue
        x = torch.randn(shape, device="cuda")
        net = net.cuda()
        fixed = math.prod(shape) * 4  # the batch itself, which the summary leaves out
        for kind in ("bf16-mixed", "32-true"):
            for parameter in net.parameters():
                parameter.grad = None
            peak, before, pieces = taken(net, x, kind == "bf16-mixed")
            row = {"network": name, "kind": kind, "computed": expected[kind], "taken": peak - fixed, "before": before}
            rows.append(row)
            print(f"  {kind}: taken {row['taken'] / MIB:.0f} MiB, {before / MIB:.0f} of it before the step", flush=True)
            print("\n".join(f"    {piece}" for piece in pieces), flush=True)
        for parameter in net.parameters():
            parameter.grad = None
        net.eval()
        gc.collect()
        with torch.no_grad():
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                prediction(net(x[:1]))
        # the whole batch lives here, of which the prediction has one image
        row = {"network": name, "kind": "predict", "computed": expected["predict"]}
        row |= {"taken": torch.cuda.max_memory_allocated() - fixed, "before": 0}
        rows.append(row)
        print(f"  predict: taken {row['taken'] / MIB:.0f} MiB", flush=True)
        del net, x
        gc.collect()
        torch.cuda.empty_cache()
    lines = ["| network | | computed (MiB) | taken (MiB) | taken / computed |", "|---|---|---|---|---|"]
    for row in rows:
        share = row["taken"] / row["computed"]
        sizes = f"{row['computed'] / MIB:.0f} | {row['taken'] / MIB:.0f}"
        lines.append(f"| {row['network']} | {row['kind']} | {sizes} | {share:.2f} |")
    print("\n".join(lines))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "memory.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2))
        (options.output / "memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
