"""Trains classifiers on two MedMNIST sets, several seeds and several at a time on one GPU, and tests each of them once.

    python benchmarks/gpu_classification.py run --data DATA --output OUT --work WORK --seconds 480
    python benchmarks/gpu_classification.py table --output OUT --work WORK

DATA holds breastmnist.npz, adrenalmnist3d.npz and adrenalmnist3d_64.npz. The best epoch is chosen on the validation
cases. What is not done after --seconds is stopped with its checkpoint; the same command goes on where it stopped, as
long as WORK is kept. OUT gets results.json and results.md. All networks of a set train by the same recipe:
medmnist_medvitv2 for images (at 224, from the file with 28 pixels), medmnist3d_pyramid for volumes.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESNET3D = "benchmark_resnet18_3d"
PYRAMID = "{{name: va_pyramid3d_small, attention: {}, drop_path_rate: 0.1}}"
# Volumes of 64 voxels a side: the first map has 16, as that of 28 has 14.
PYRAMID_64 = "{{name: va_pyramid3d_small, attention: {}, strides: [4, 2, 2, 2], drop_path_rate: 0.1}}"
NETWORKS = {
    "breast": {
        "va_medvit_tiny": "{name: va_medvit_tiny}",
        "va_medvit_dina_tiny": "{name: va_medvit_dina_tiny}",
        "resnet18 (timm)": "{name: resnet18}",
    },
    "adrenal": {
        "va_pyramid3d_small, neighborhood": PYRAMID.format("neighborhood"),
        "va_pyramid3d_small, window": PYRAMID.format("window"),
        "resnet18 (MONAI, 3-D)": f"{{name: {RESNET3D}}}",
    },
    "adrenal64": {
        "va_pyramid3d_small, neighborhood": PYRAMID_64.format("neighborhood"),
        "va_pyramid3d_small, window": PYRAMID_64.format("window"),
        "resnet18 (MONAI, 3-D)": f"{{name: {RESNET3D}, conv1_t_stride: 2}}",
    },
}
SETS = {  # name: title, recipe, networks, keys
    "breast": ("BreastMNIST, 28 to 224", "medmnist_medvitv2", "breast", {"flag": "breastmnist"}),
    "adrenal28": ("AdrenalMNIST3D, 28", "medmnist3d_pyramid", "adrenal", {"flag": "adrenalmnist3d"}),
    "adrenal64": ("AdrenalMNIST3D, 64", "medmnist3d_pyramid", "adrenal64", {"flag": "adrenalmnist3d", "native": "64"}),
}
PUBLISHED = {
    "breast": "accuracy 0.833 (ResNet-18 at 224), 0.882 (MedViTV2-T at 224, epoch chosen on the test images)",
    "adrenal28": "accuracy 0.721 (ResNet-18, 3-D), 0.754 (ResNet-18, ACS)",
    "adrenal64": "accuracy 0.721 (ResNet-18, 3-D), 0.754 (ResNet-18, ACS), both at 28",
}


@dataclass(frozen=True)
class Job:
    """One training with its test."""

    data: str
    network: str
    seed: int

    def folder(self, work: Path) -> Path:
        """Its run folder."""
        word = "".join(letter if letter.isalnum() else "_" for letter in self.network)
        return work / f"{self.data}-{word}-{self.seed}"

    def scores(self, work: Path) -> dict[str, Any] | None:
        """AUC and accuracy on the test cases and more, once it is done."""
        folder = self.folder(work)
        if not (folder / "test" / "summary.json").is_file():
            return None
        summary = json.loads((folder / "test" / "summary.json").read_text())
        means, own = summary["means"], json.loads((folder / "summary.json").read_text())
        return {
            "data": self.data, "network": self.network, "seed": self.seed, "auc": means["all/auc"],
            "accuracy": means["all/accuracy"], "balanced_accuracy": means["all/balanced_accuracy"],
            "ece": means["all/ece"], "val_auc": own["means"]["all/auc"], "best_epoch": summary["best_epoch"] + 1,
            "seconds": own["seconds"], "hardware": summary["hardware"],
        }  # fmt: skip


def jobs(options: argparse.Namespace) -> list[Job]:
    """Every job, seed by seed."""
    order = ["breast", "adrenal28", "adrenal64"]
    return [
        Job(data, network, seed)
        for data in order
        if data in options.sets
        for seed in options.seeds
        for network in NETWORKS[SETS[data][2]]
    ]


def one(options: argparse.Namespace) -> int:
    """Train (or go on training) one job in this process, then test it."""
    sys.path.insert(0, str(ROOT))
    from visattn.cli import main

    register()
    job = Job(*options.job[:2], int(options.job[2]))
    _, recipe, group, data = SETS[job.data]
    folder = job.folder(options.work)
    words = ["fit", "--config", recipe, "--run", str(folder), "--seed_everything", str(job.seed)]
    words += ["--model.network", NETWORKS[group][job.network], "--data.root", str(options.data.resolve())]
    epochs = {"breast": options.breast_epochs, "adrenal28": options.adrenal_epochs}.get(job.data, options.large_epochs)
    words += ["--trainer.max_epochs", str(epochs), "--data.num_workers", str(options.workers)]
    words += [word for key, value in data.items() for word in (f"--data.{key}", value)]
    words += [word for pair in options.set for word in (f"--{pair.split('=', 1)[0]}", pair.split("=", 1)[1])]
    if not (folder / "report.html").is_file():
        last = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").is_file() else []
        code = main([*words, *last])
        if code:
            return code
    return main(["test", "--config", str(folder / "config.yaml"), "--run", str(folder)])


def register() -> None:
    """Let timm, and so recipes, know MONAI's 3-D ResNet-18."""
    import timm
    from monai.networks.nets import resnet18
    from timm.models import register_model

    def benchmark_resnet18_3d(pretrained: bool = False, in_chans: int = 1, num_classes: int = 2, **more: Any) -> Any:
        del pretrained
        unused = {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
        more = {key: value for key, value in more.items() if key not in unused}
        return resnet18(spatial_dims=3, n_input_channels=in_chans, num_classes=num_classes, **more)

    if not timm.is_model(RESNET3D):
        register_model(benchmark_resnet18_3d)


def run(options: argparse.Namespace) -> None:
    """Train what is not done yet, several at a time, until the time is up."""
    began = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs(options) if job.scores(options.work) is None]
    print(f"{len(waiting)} of {len(jobs(options))} jobs to do", flush=True)
    running: dict[Job, subprocess.Popen[bytes]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    fixed = [sys.executable, __file__, "one", "--data", str(options.data), "--work", str(options.work)]
    for key in ("workers", "breast_epochs", "adrenal_epochs", "large_epochs"):
        fixed += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    fixed += [word for pair in options.set for word in ("--set", pair)]
    while (waiting or running) and time.monotonic() - began < options.seconds:
        while waiting and len(running) < options.parallel:
            job = waiting.pop(0)
            with job.folder(options.work).with_suffix(".log").open("ab") as log:
                words = [*fixed, "--job", job.data, job.network, str(job.seed)]
                running[job] = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
        for job, process in list(running.items()):
            if process.poll() is None:
                continue
            del running[job]
            scores = job.scores(options.work)
            text = "failed" if scores is None else f"AUC {scores['auc']:.3f}, accuracy {scores['accuracy']:.3f}"
            print(f"[{time.monotonic() - began:4.0f} s] {job.data}, {job.network}, seed {job.seed}: {text}", flush=True)
            if scores is None:
                end = job.folder(options.work).with_suffix(".log").read_text(errors="replace").splitlines()[-12:]
                print("\n".join(end), flush=True)
        time.sleep(0.2)
    for process in running.values():
        process.send_signal(signal.SIGTERM)  # the training saves where it is
    for job, process in running.items():
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        print(f"stopped: {job.data}, {job.network}, seed {job.seed}", flush=True)
    table(options)


def table(options: argparse.Namespace) -> None:
    """Write and print what is done."""
    done = [scores for job in jobs(options) if (scores := job.scores(options.work)) is not None]
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(done, indent=1) + "\n")
    lines = []
    for data, (title, recipe, group, _) in SETS.items():
        lines += [f"\n{title} (recipe {recipe}; published: {PUBLISHED[data]})\n"]
        lines += ["| network | seeds | AUC | accuracy | balanced accuracy | s / run |", "|---|---|---|---|---|---|"]
        for network in NETWORKS[group]:
            own = [row for row in done if (row["data"], row["network"]) == (data, network)]
            if own:
                cells = [spread([row[key] for row in own]) for key in ("auc", "accuracy", "balanced_accuracy")]
                seconds = statistics.mean(row["seconds"] for row in own)
                lines.append(f"| {network} | {len(own)} | {' | '.join(cells)} | {seconds:.0f} |")
    text = "\n".join(lines).strip() + "\n"
    (options.output / "results.md").write_text(text)
    print(text, flush=True)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "one", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--parallel", type=int, default=9)
    parser.add_argument("--workers", type=int, default=1, help="loading processes of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--breast-epochs", type=int, default=60)
    parser.add_argument("--adrenal-epochs", type=int, default=40)
    parser.add_argument("--large-epochs", type=int, default=20, help="for volumes of 64 voxels a side")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another key of the recipes")
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    if options.what == "one":
        sys.exit(one(options))
    (run if options.what == "run" else table)(options)
