"""Trains AGUNet on synthetic heads at full size, then predicts unseen heads on the GPU and on the CPU and compares.

    python benchmarks/gpu_volumes.py --output OUT    (about 9 minutes, for one large GPU; README.md has a rehearsal)

`recipes/meningioma_agunet.yaml` trains on the embedded phantom for as many epochs as fit `--seconds`, which a probe of
a few epochs tells. Heads of another seed are written as NIfTI and predicted by `visattn predict`; `visattn evaluate`
scores them, lesion by lesion and patient by patient, below 3 ml and from 3 ml on. Two of them are predicted on the CPU
and once more on the GPU in float32, and the masks are compared voxel by voxel.

OUT gets results.md (all tables), results.json, evaluation.csv (a row for each head), report.html of the predictions and
two overlays. Runs, heads, masks and logs lie in --work.
"""

import argparse
import csv
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_polyps import say, stop, tail

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RECIPE = ROOT / "recipes" / "meningioma_agunet.yaml"
PROBE_EPOCHS = 4
VALIDATIONS = 6  # in a run: validation scores whole heads on the CPU
LIMIT_ML = 3.0
GROUPS = {"all": "", "< 3 ml": "_small", ">= 3 ml": "_large"}
COMPARED = 2


@dataclass
class Step:
    """A command that was run, and what it took."""

    name: str
    seconds: float
    gpu_mib: int | None
    output: str
    code: int


@dataclass
class Bench:
    """One run of this script."""

    options: argparse.Namespace
    began: float = field(default_factory=time.monotonic)
    steps: list[Step] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.options.deadline - (time.monotonic() - self.began)

    def call(self, name: str, *words: object, limit: float | None = None, allowed: tuple[int, ...] = (0,)) -> Step:
        """Run `visattn` with `words` in a process of its own.

        Raises:
            SystemExit: It ended with another code than those that are allowed; the end of its log is printed.
        """
        log = self.options.work / f"{name}.log"
        started = time.monotonic()
        used: list[int] = []
        done = threading.Event()
        watcher = threading.Thread(target=watch_gpu, args=(used, done.wait), daemon=True)
        watcher.start()
        path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
        with log.open("wb") as handle:
            command = [sys.executable, "-m", "visattn", *map(str, words)]
            environment = os.environ | {"PYTHONPATH": path, "NO_ALBUMENTATIONS_UPDATE": "1"}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=handle, stderr=subprocess.STDOUT)
        try:
            process.wait(max(1.0, min(self.left, limit or self.left)))
        except subprocess.TimeoutExpired:
            stop(process)
        done.set()
        watcher.join()
        step = Step(name, round(time.monotonic() - started, 1), max(used, default=None), tail(log), process.returncode)
        self.steps.append(step)
        memory = "" if step.gpu_mib is None else f", GPU memory up to {step.gpu_mib} MiB"
        say(f"{name}: {step.seconds:.1f} s, code {step.code}{memory}", self.began)
        if step.code not in allowed:
            print(f"--- end of {log.name}\n{step.output}", flush=True)
            raise SystemExit(f"{name} failed with code {step.code}")
        return step


def watch_gpu(used: list[int], wait: Callable[[float], bool]) -> None:
    """Collect the MiB of the first GPU that are in use, a few times a second, until `wait` says that it is over."""
    if shutil.which("nvidia-smi") is None:
        return
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    while True:
        answer = subprocess.run(query, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip().isdigit():
            used.append(int(answer.stdout))
        if wait(0.3):
            return


def fit_words(bench: Bench, run: Path, epochs: int, every: int) -> list[object]:
    """Arguments of `visattn fit`."""
    options = bench.options
    root = "phantom" if options.train is None else options.work / "training"
    words: list[object] = ["fit", "--config", RECIPE, "--run", run, "--data.root", root]
    words += ["--data.cache_dir", options.work / "cache", "--trainer.max_epochs", epochs]
    words += ["--trainer.check_val_every_n_epoch", every]
    words += [] if options.device == "auto" else ["--trainer.accelerator", options.device]
    for pair in options.set:
        key, value = pair.split("=", 1)
        words += [f"--{key}", value]
    return words


def epoch_seconds(run: Path) -> list[float]:
    """Seconds of each finished epoch."""
    with (run / "metrics.csv").open(newline="") as handle:
        return [float(row["seconds"]) for row in csv.DictReader(handle) if row["seconds"]]


def choose_epochs(bench: Bench) -> tuple[int, int]:
    """Epochs that fit the time, and every how many of them to validate.

    The cache of prepared heads is filled here, and stays.
    """
    run = bench.options.work / "probe"
    probe = bench.call("probe", *fit_words(bench, run, PROBE_EPOCHS, PROBE_EPOCHS))
    *plain, last = seconds = epoch_seconds(run)
    epoch = statistics.median(plain[1:])
    validation = max(0.0, last - epoch)
    around = probe.seconds - sum(seconds)  # imports, checks, CUDA; scores and pictures at the end
    wanted = min(bench.options.seconds, bench.left - bench.options.reserve - 10) - around
    epochs = max(1, int((wanted - VALIDATIONS * validation) / epoch))
    say(f"an epoch takes {epoch:.2f} s, a validation {validation:.1f} s: {epochs} epochs", bench.began)
    return epochs, max(1, epochs // VALIDATIONS)


def predict(bench: Bench, name: str, inputs: list[Path], checkpoint: Path, *more: str) -> Path:
    """Masks of heads, in a folder of their own."""
    output = bench.options.work / name
    bench.call(name, "predict", *inputs, "--checkpoint", checkpoint, "--output", output, *more)
    return output


def most_marked(masks: Path) -> list[Path]:
    """The heads with the largest predictions: masks that mark nothing agree easily."""
    with (masks / "volumes.csv").open(newline="") as handle:
        rows = sorted(csv.DictReader(handle), key=lambda row: -float(row["ml"]))
    return [Path(row["image"]) for row in rows[:COMPARED]]


def agreement(one: Path, other: Path) -> dict[str, Any]:
    """Voxels in which two masks differ, and their Dice."""
    import numpy as np

    from visattn.data.nifti import read_labels

    first, second = read_labels(one)[0] > 0, read_labels(other)[0] > 0
    total = int(first.sum()) + int(second.sum())
    return {
        "case": one.name.removesuffix("_mask.nii.gz"),
        "voxels": first.size,
        "marked": [int(first.sum()), int(second.sum())],
        "differ": int((first != second).sum()),
        "dice": 2 * int(np.logical_and(first, second).sum()) / total if total else None,
    }


def scores(bench: Bench, masks: Path) -> dict[str, Any]:
    """Scores of the masks of all heads against the truth."""
    from visattn.metrics import detections

    labels, output = bench.options.work / "labels.yaml", bench.options.work / "evaluation"
    labels.write_text("background: 0\nmeningioma: 1\n")
    bench.call(
        "evaluate", "evaluate", masks, bench.options.work / "heads" / "labelsTr", "--labels", labels, "--output", output
    )
    with (output / "cases.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    shutil.copy(output / "cases.csv", bench.options.output / "evaluation.csv")
    result: dict[str, Any] = {}
    found = detections(rows)["meningioma"]
    for title, suffix in GROUPS.items():
        own = [row for row in rows if float(row["true_ml"]) > 0]
        own = [row for row in own if not suffix or (float(row["true_ml"]) < LIMIT_ML) == (suffix == "_small")]
        means = {}
        for metric in ("dice", "volume_error", "hd95", "nsd"):
            values = [float(row[metric]) for row in own if row[metric]]
            means[metric] = statistics.mean(values) if values else None
        pooled = {kind: found[f"{kind}{suffix}"].to_json() for kind in ("patients", "lesions")}
        result[title] = {"heads": len(own), "means": means, **pooled}
    result["healthy"] = sum(float(row["true_ml"]) == 0 for row in rows)
    return result


def markdown(results: dict[str, Any]) -> str:
    """The tables."""

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"

    lines = [
        "| heads with meningioma | n | Dice | volume error (ml) | HD95 (mm) | NSD at 2 mm | patients found, false | "
        "lesions found, false | lesion precision | lesion recall | lesion F1 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for title in GROUPS:
        entry = results["scores"][title]
        means, patients, lesions = entry["means"], entry["patients"], entry["lesions"]
        cells = [title, str(entry["heads"]), shown(means["dice"]), shown(means["volume_error"], 2)]
        cells += [shown(means["hd95"], 1), shown(means["nsd"])]
        cells += [f"{one['found']} of {one['true']}, {one['false']}" for one in (patients, lesions)]
        cells += [shown(lesions[name]) for name in ("precision", "recall", "f1")]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"{results['scores']['healthy']} further heads are healthy; a false detection there counts by its size.",
    ]
    lines += ["", "| masks | head | voxels | marked | differ | Dice |", "|---|---|---|---|---|---|"]
    for name, rows in results["agreement"].items():
        for row in rows:
            marked = " and ".join(map(str, row["marked"]))
            cells = [name, row["case"], str(row["voxels"]), marked, str(row["differ"]), shown(row["dice"], 4)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| step | seconds | GPU memory in use, MiB |", "|---|---|---|"]
    lines += [f"| {step['name']} | {step['seconds']} | {step['gpu_mib'] or '-'} |" for step in results["steps"]]
    about = results["about"]
    lines += ["", "; ".join(f"{key} {value}" for key, value in about.items()) + "."]
    return "\n".join(lines) + "\n"


def about(options: argparse.Namespace, run: Path, epochs: int) -> dict[str, Any]:
    """Where and how the numbers were made."""
    import lightning
    import torch

    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").is_file() else {}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "epochs": f"{len(epoch_seconds(run))} of {epochs}",
        "best epoch": summary.get("best_epoch"),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "settings": " ".join(options.set) or "those of the recipe",
    }


def main() -> None:
    """Train, predict, compare, tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu_volumes", help="heads, runs, masks, logs")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--seconds", type=float, default=330, help="training time to fill")
    parser.add_argument("--deadline", type=float, default=540, help="seconds for everything")
    parser.add_argument("--reserve", type=float, default=120, help="of them for what comes after training")
    parser.add_argument("--epochs", type=int, help="default: what fits --seconds")
    parser.add_argument("--train", type=int, metavar="COUNT", help="heads to train on, in place of the phantom's 100")
    parser.add_argument("--heads", type=int, default=40, help="unseen heads to predict")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of the recipe")
    bench = Bench(parser.parse_args())
    options = bench.options
    options.work, options.output = options.work.resolve(), options.output.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.mkdir(parents=True, exist_ok=True)

    for folder, count, seed in (("heads", options.heads, 20261), ("training", options.train, 20262)):
        if count is not None:
            bench.call(folder, "phantom", options.work / folder, "--kind", "head", "--count", count, "--seed", seed)
    epochs, every = (options.epochs, max(1, options.epochs // VALIDATIONS)) if options.epochs else choose_epochs(bench)
    run = options.work / "run"
    # Asked to stop it saves its weights and ends with code 143.
    words = fit_words(bench, run, epochs, every)
    bench.call("fit", *words, limit=max(30.0, bench.left - options.reserve), allowed=(0, 143))
    checkpoints = run / "checkpoints"
    checkpoint = next(path for path in (checkpoints / "best.ckpt", checkpoints / "last.ckpt") if path.is_file())

    folder = options.work / "heads" / "imagesTr"
    masks = predict(bench, "predicted", [folder], checkpoint, "--device", options.device, "--overlays")
    results: dict[str, Any] = {"scores": scores(bench, masks), "agreement": {}}
    few = most_marked(masks)
    device = "CPU" if options.device == "cpu" else "GPU"
    slow = predict(bench, "predicted_cpu", few, checkpoint, "--device", "cpu")
    exact = predict(bench, "predicted_float32", few, checkpoint, "--device", options.device, "--precision", "float32")
    for name, one, other in (
        (f"{device} as by default, CPU", masks, slow),
        (f"{device} as by default, {device} in float32", masks, exact),
        (f"{device} in float32, CPU", exact, slow),
    ):
        pairs = [(one / path.name, path) for path in sorted(other.glob("*_mask.nii.gz"))]
        results["agreement"][name] = [agreement(mine, theirs) for mine, theirs in pairs]

    results |= {"steps": [asdict(step) for step in bench.steps], "about": about(options, run, epochs)}
    (options.output / "results.json").write_text(json.dumps(results, indent=1))
    (options.output / "results.md").write_text(markdown(results))
    shutil.copy(masks / "report.html", options.output / "report.html")
    for picture in sorted((masks / "overlays").glob("*.png"))[:COMPARED]:
        shutil.copy(picture, options.output / picture.name)
    print(bench.steps[-3].output, markdown(results), sep="\n", flush=True)
    say("done", bench.began)


if __name__ == "__main__":
    main()
