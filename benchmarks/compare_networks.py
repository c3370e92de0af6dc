"""Trains networks of ours and of others on equal terms, several seeds each, and compares them on held-out cases.

    python benchmarks/compare_networks.py run --data DATA --work RUNS --output OUT --steps 1000
    python benchmarks/compare_networks.py table --work RUNS --output OUT          (the tables of what is there)

DATA holds kvasir_seg/, cvc_clinicdb/ and hippocampus/. compare/polyps.yaml and compare/hippocampus.yaml beside this
script are the terms: data, augmentation, loss, optimiser and schedule, the same for every network; only
`model.network` differs. The best checkpoint on validation is scored once on the test cases. Networks of others train in
the same loop: they are entered into visattn's table of networks under names of their own.

A job is one training; finished ones are kept, so an interrupted list goes on where it stopped. All networks of a task
make the same number of steps. OUT gets, for each task, TASK.md, and results.json: mean and deviation over seeds,
`visattn compare` of the networks' mean scores per case, and seconds a step and peak memory, each measured alone.
"""

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DINA: list[Any] = [
    {"name": "neighborhood", "kernel_size": 5},
    {"name": "neighborhood", "kernel_size": 5, "dilation": 2},
]
MAXVIT: list[Any] = [{"name": "window", "window_size": 5}, {"name": "grid", "grid_size": 5}]
# The first network of a task is the baseline of its comparison.
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "polyps": {
        "smp_unet_resnet34": {"name": "smp_unet_resnet34"},
        "monai_attention_unet": {"name": "monai_attention_unet"},
        "unet_biformer": {"name": "unet", "backbone": "va_biformer_tiny", "skip": "gate"},
        "unet_pyramid_neighborhood": {"name": "unet", "backbone": "va_pyramid_small", "decoder": "residual"},
    },
    "hippocampus": {
        "unet3d": {"name": "unet3d", "filters": [32, 64, 128, 256]},
        "monai_unet": {"name": "monai_unet"},
        "monai_swin_unetr": {"name": "monai_swin_unetr"},
        "unet_dina": {
            "name": "unet",
            "dims": 3,
            "backbone": "va_pyramid3d_small",
            "backbone_args": {"depths": [2, 2, 4, 2], "attention": [DINA, DINA, [*DINA, *DINA], DINA[:1] * 2]},
        },
        "unet_maxvit": {
            "name": "unet",
            "dims": 3,
            "backbone": "va_pyramid3d_small",
            "backbone_args": {"depths": [2, 2, 4, 2], "attention": [MAXVIT, MAXVIT, [*MAXVIT, *MAXVIT], MAXVIT]},
        },
    },
}
METRICS = {"polyps": ("dice", "iou", "hd95"), "hippocampus": ("dice", "hd95", "nsd")}
INPUT = {"polyps": (16, 3, 352, 352), "hippocampus": (8, 1, 40, 56, 40)}
CLASSES = {"polyps": 1, "hippocampus": 3}
TEST_SHARE, VAL_SHARE = 5, 10  # every 5th volume tests, every 10th of the others validates


def enter_peers() -> None:
    """Put the networks of other libraries into visattn's table, for this process."""
    from torch import Tensor, nn

    import visattn.networks as networks
    from visattn.networks._sizes import crop, pad_to_multiple

    class Padded(nn.Module):
        """A network that takes multiples of `multiple` only."""

        def __init__(self, net: nn.Module, multiple: int) -> None:
            super().__init__()
            self.net, self.multiple = net, multiple

        def forward(self, x: Tensor) -> Tensor:
            return crop(self.net(pad_to_multiple(x, self.multiple)), x.shape[2:])

    def smp_unet_resnet34(in_channels: int = 3, classes: int = 1) -> nn.Module:
        import segmentation_models_pytorch as smp

        net = smp.Unet("resnet34", encoder_weights=None, in_channels=in_channels, classes=classes)
        return Padded(net, 32)

    def monai_attention_unet(in_channels: int = 3, classes: int = 1) -> nn.Module:
        from monai.networks.nets import AttentionUnet

        return Padded(AttentionUnet(2, in_channels, classes, (32, 64, 128, 256, 512), (2, 2, 2, 2)), 16)

    def monai_unet(in_channels: int = 1, classes: int = 2, dims: int = 3) -> nn.Module:
        from monai.networks.nets import UNet

        net = UNet(dims, in_channels, classes, (32, 64, 128, 256), (2, 2, 2), num_res_units=2, norm="instance")
        return Padded(net, 8)

    def monai_swin_unetr(in_channels: int = 1, classes: int = 2, dims: int = 3) -> nn.Module:
        from monai.networks.nets import SwinUNETR

        return Padded(SwinUNETR(in_channels, classes, feature_size=24, spatial_dims=dims), 32)

    for builder in (smp_unet_resnet34, monai_attention_unet, monai_unet, monai_swin_unetr):
        networks.NETWORKS[builder.__name__] = builder


def hippocampus_split(data: Path) -> dict[str, list[str]]:
    """Which volume trains, validates and tests, by the names in alphabetical order."""
    names = sorted(path.name.removesuffix(".nii.gz") for path in (data / "hippocampus" / "imagesTr").glob("*.nii.gz"))
    test = names[::TEST_SHARE]
    rest = [name for name in names if name not in set(test)]
    val = rest[::VAL_SHARE]
    return {"train": [name for name in rest if name not in set(val)], "val": val, "test": test}


def keys(task: str, options: argparse.Namespace) -> list[str]:
    """Command-line keys that lay the data over the terms of a task."""
    from visattn.files import write_text_atomic

    if task == "polyps":
        roots = [str(options.data / name) for name in ("kvasir_seg", "cvc_clinicdb")]
        split = HERE / "polyp_splits.json"
    else:
        roots = [str(options.data / "hippocampus")]
        split = options.work / "hippocampus_split.json"
        split.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(split, json.dumps(hippocampus_split(options.data)))  # by every job, the same
    pairs = {
        "data.root": json.dumps(roots if len(roots) > 1 else roots[0]),
        "data.split": json.dumps({"files": str(split)}),
        "data.num_workers": str(options.workers),
    }
    return [word for key, value in pairs.items() for word in (f"--{key}", value)]


def epochs_of(task: str, steps: int) -> int:
    """Epochs of about `steps` optimiser steps."""
    each = 50 if task == "hippocampus" else len(json.loads((HERE / "polyp_splits.json").read_text())["train"]) // 16
    return max(1, round(steps / each))


def job(options: argparse.Namespace) -> int:
    """Train one network with one seed and score it, in this process."""
    enter_peers()
    from visattn.cli import main as visattn

    folder = options.work / options.task / f"{options.network}-{options.seed}"
    config = ["--config", str(HERE / "compare" / f"{options.task}.yaml"), "--run", str(folder)]
    network = json.dumps(NETWORKS[options.task][options.network])
    words = [*config, *keys(options.task, options), "--model.network", network, "--seed_everything", str(options.seed)]
    epochs = epochs_of(options.task, options.steps)
    words += ["--trainer.max_epochs", str(epochs), "--trainer.check_val_every_n_epoch", str(max(1, epochs // 10))]
    words += [word for pair in options.set for word in (f"--{pair.split('=', 1)[0]}", pair.split("=", 1)[1])]
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").is_file() else []
    trained = (folder / "report.html").is_file()
    return (0 if trained else visattn(["fit", *words, *resume])) or visattn(["test", *words])


def measure(task: str, name: str) -> dict[str, float]:
    """Seconds of a training step and peak memory of one network, alone on the device."""
    import torch

    from visattn.networks import create_model, prediction

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = INPUT[task] if device.type == "cuda" else (2, *INPUT[task][1:])
    torch.manual_seed(0)
    net = create_model(in_channels=shape[1], classes=CLASSES[task], **NETWORKS[task][name]).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    x = torch.randn(shape, device=device)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(12 if device.type == "cuda" else 3):
        wait()
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = prediction(net(x)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    parameters = sum(p.numel() for p in net.parameters())
    return {"step_s": statistics.median(times[len(times) // 3 :]), "peak_gib": peak, "parameters": parameters}


def mean_scores(task: str, network: str, options: argparse.Namespace) -> tuple[Path, list[dict[str, float]]] | None:
    """A scored folder with each case's mean over seeds, and the summary means of every seed; None if none finished."""
    from visattn.scored import read_cases, read_summary, write_cases, write_summary

    runs = [options.work / task / f"{network}-{seed}" / "test" for seed in options.seeds]
    runs = [run for run in runs if (run / "cases.csv").is_file()]
    if not runs:
        return None
    tables = [read_cases(run / "cases.csv") for run in runs]
    rows: list[dict[str, Any]] = []
    for same in zip(*tables, strict=True):
        row: dict[str, Any] = {key: same[0][key] for key in ("case", "group", "class")}
        for key in same[0]:
            if key not in ("case", "group", "class", "split"):
                values = [float(each[key]) for each in same if each[key] not in ("", "nan")]
                row[key] = statistics.mean(values) if len(values) == len(same) else float("nan")
        rows.append(row)
    folder = options.output / task / network
    folder.mkdir(parents=True, exist_ok=True)
    write_cases(folder / "cases.csv", rows, "test")
    write_summary(folder, read_summary(runs[0] / "summary.json"))
    means = []
    for table in tables:
        own = {}
        for metric in METRICS[task]:
            values = [float(row[metric]) for row in table if row.get(metric) not in (None, "", "nan")]
            own[metric] = statistics.mean(values) if values else float("nan")
        means.append(own)
    return folder, means


def tables(options: argparse.Namespace) -> None:
    """Write what is known of every task."""
    enter_peers()
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"about": about(options)}
    for task in options.tasks:
        found = {name: mean_scores(task, name, options) for name in NETWORKS[task]}
        found = {name: scores for name, scores in found.items() if scores is not None}
        if not found:
            continue
        heads = ["network", "parameters (M)", "step (ms)", "peak (GiB)", *METRICS[task], "seeds"]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        results[task] = {}
        for name, scores in found.items():
            assert scores is not None
            cost = measure(task, name)
            cells = [name, f"{cost['parameters'] / 1e6:.1f}", f"{cost['step_s'] * 1e3:.0f}", f"{cost['peak_gib']:.1f}"]
            for metric in METRICS[task]:
                values = [each[metric] for each in scores[1]]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            lines.append(f"| {' | '.join([*cells, str(len(scores[1]))])} |")
            results[task][name] = {"cost": cost, "seeds": scores[1]}
        folders = [str(scores[0]) for scores in found.values() if scores is not None]
        compared = subprocess.run(
            [sys.executable, "-m", "visattn", "compare", *folders],
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        text = "\n".join([*lines, "", "```text", compared.stdout.strip() or compared.stderr.strip(), "```", ""])
        (options.output / f"{task}.md").write_text(text)
        print(f"## {task}\n{text}", flush=True)
    (options.output / "results.json").write_text(json.dumps(results))


def environment() -> dict[str, str]:
    """The processes share the cores, so each keeps to one thread."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where and how the numbers were made."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__, "steps": options.steps}


def run(options: argparse.Namespace) -> None:
    """Train all jobs, then write the tables."""
    began = time.monotonic()
    networks = [(task, name) for task in options.tasks for name in NETWORKS[task]]
    # Seed by seed, so that what a deadline leaves is still a comparison; with each seed a network moves on to the next
    # GPU, so that every GPU gets its share of the slow ones.
    jobs = [
        (n + m, task, name, seed) for m, seed in enumerate(options.seeds) for n, (task, name) in enumerate(networks)
    ]

    def one(job: tuple[int, str, str, int]) -> None:
        place, task, name, seed = job
        folder = options.work / task / f"{name}-{seed}"
        if (folder / "test" / "summary.json").is_file():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        left = options.deadline - (time.monotonic() - began)
        if left < 20:
            return
        words = [sys.executable, str(HERE / "compare_networks.py"), "job", task, name, str(seed)]
        words += ["--data", str(options.data), "--work", str(options.work), "--steps", str(options.steps)]
        words += ["--workers", str(options.workers), "--set", *options.set]
        own = {} if options.gpus < 2 else {"CUDA_VISIBLE_DEVICES": str(place % options.gpus)}
        with folder.with_suffix(".log").open("ab") as log:
            process = subprocess.Popen(words, cwd=ROOT, env=environment() | own, stdout=log, stderr=subprocess.STDOUT)
            try:
                code: int | None = process.wait(left)
            except subprocess.TimeoutExpired:
                process.kill()
                code = None
        print(f"[{time.monotonic() - began:4.0f} s] {task} {name} seed {seed}: exit {code}", flush=True)
        if code:
            print("\n".join(folder.with_suffix(".log").read_text(errors="replace").splitlines()[-12:]), flush=True)
        rows = list(csv.DictReader((folder / "metrics.csv").open())) if (folder / "metrics.csv").is_file() else []
        print(f"    {len(rows)} epochs in {time.monotonic() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(options.parallel) as pool:
        list(pool.map(one, jobs))
    tables(options)


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("run", "train, score, tabulate"), ("table", "tabulate what is there"), ("job", "one training")):
        command = commands.add_parser(name, help=text)
        if name == "job":
            command.add_argument("task", choices=NETWORKS)
            command.add_argument("network")
            command.add_argument("seed", type=int)
        else:
            command.add_argument("--output", type=Path, required=True)
            command.add_argument("--tasks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
            command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
            command.add_argument("--parallel", type=int, default=8, help="runs at once")
            command.add_argument("--gpus", type=int, default=1, help="GPUs that share the runs")
            command.add_argument("--deadline", type=float, default=1e9, help="seconds after which training stops")
        command.add_argument("--data", type=lambda text: Path(text).resolve(), default=Path())
        command.add_argument("--work", type=lambda text: Path(text).resolve(), required=True)
        command.add_argument("--steps", type=int, default=1000, help="optimiser steps of every network")
        command.add_argument("--workers", type=int, default=1, help="data processes of each run")
        command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys, for a rehearsal")
    options = parser.parse_args()
    if options.command == "job":
        sys.exit(job(options))
    (run if options.command == "run" else tables)(options)


if __name__ == "__main__":
    main()
