"""Trains three polyp networks from scratch, several seeds each and all at once, and compares them on held-out images.

    python benchmarks/gpu_polyps.py run --data DATA --output OUT --seconds 420    (steps chosen to fit the time)
    python benchmarks/gpu_polyps.py run --data DATA --output OUT --steps 1500
    python benchmarks/gpu_polyps.py table OUT/results.json                        (the tables again)

DATA holds kvasir_seg/ and cvc_clinicdb/, each with images/ and masks/; polyp_splits.json beside this script says which
image trains, validates and tests. Every network makes the same number of optimiser steps. `polyp_pranet` and
`polyp_pranet_official` are the packaged recipes, trained by `visattn fit`; `smp_unet_resnet34` is trained by
polyp_unet.py with the data and schedule of `polyp_pranet`. The checkpoint is the one with the best validation Dice.
Test images are scored once, by visattn.metrics on the mask at their own size.

OUT gets results.json (every metric of every case of every run), results.md, and a sheet of overlays for each network.
Runs and logs lie in --work.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SPLITS = HERE / "polyp_splits.json"
SETS = {"kvasir_seg": "Kvasir-SEG", "cvc_clinicdb": "ClinicDB"}
UNET = "smp_unet_resnet34"
NETWORKS = ("polyp_pranet_official", "polyp_pranet", UNET)  # the slowest first
RECIPE = {"polyp_pranet": "polyp_pranet", "polyp_pranet_official": "polyp_pranet_official", UNET: "polyp_pranet"}
COLUMNS = {"dice": "Dice", "iou": "IoU", "pranet_dice": "Dice, PraNet's protocol", "hd95": "HD95 (px)"}
PROBE_EPOCHS = 4
SHEET_CASES = 12


@dataclass(frozen=True)
class Job:
    """One training run."""

    network: str
    seed: int
    epochs: int
    folder: Path

    @property
    def name(self) -> str:
        """Network and seed, as files and logs are called."""
        return f"{self.network}-{self.seed}"

    def finished_epochs(self) -> list[dict[str, str]]:
        """The rows of metrics.csv."""
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return []
        with path.open(newline="") as handle:
            return list(csv.DictReader(handle))


def recipe_of(network: str) -> dict[str, Any]:
    """The recipe that a network trains with."""
    from visattn.recipe import find_recipe, load_recipe

    return load_recipe(find_recipe(str(ROOT / "recipes" / f"{RECIPE[network]}.yaml")))


def steps_per_epoch(network: str) -> int:
    """Optimiser steps of one epoch: full batches, once for each scale."""
    data = recipe_of(network)["data"]["init_args"]
    cases = len(json.loads(SPLITS.read_text())["train"])
    return cases // data["batch_size"] * len(data.get("scales", [1.0]))


def data_overrides(options: argparse.Namespace) -> dict[str, str]:
    """What replaces the data keys of a recipe, as YAML text."""
    roots = [str(options.data.resolve() / name) for name in SETS]
    keys = {"root": json.dumps(roots), "split": json.dumps({"files": str(SPLITS)}), "num_workers": str(options.workers)}
    return keys | ({"size": str(options.size)} if options.size else {})


def command(job: Job, options: argparse.Namespace) -> list[str]:
    """What trains a job."""
    keys = data_overrides(options)
    if job.network == UNET:
        pairs = [f"{key}={value}" for key, value in keys.items()]
        fixed = ["--run", str(job.folder), "--epochs", str(job.epochs), "--seed", str(job.seed)]
        fixed += ["--validate-every", str(options.validate_every)]
        return [sys.executable, str(HERE / "polyp_unet.py"), "--recipe", RECIPE[job.network], *fixed, *pairs]
    words = ["--run", str(job.folder), "--seed_everything", str(job.seed), "--trainer.max_epochs", str(job.epochs)]
    words += ["--trainer.check_val_every_n_epoch", str(min(options.validate_every, job.epochs))]
    words += [word for key, value in keys.items() for word in (f"--data.{key}", value)]
    words += [word for pair in options.set for word in (f"--{pair.split('=', 1)[0]}", pair.split("=", 1)[1])]
    recipe = str(ROOT / "recipes" / f"{RECIPE[job.network]}.yaml")
    return [sys.executable, "-m", "visattn", "fit", "--config", recipe, *words]


def environment() -> dict[str, str]:
    """The processes share the cores, so each keeps to one thread."""
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}


def start(words: list[str], log: Path, gpu: int | None = None) -> subprocess.Popen[bytes]:
    """Start a process that writes to `log` and sees one GPU."""
    log.parent.mkdir(parents=True, exist_ok=True)
    own = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
    with log.open("ab") as handle:
        return subprocess.Popen(words, cwd=ROOT, env=environment() | own, stdout=handle, stderr=subprocess.STDOUT)


def gpu_of(job: Job, options: argparse.Namespace) -> int | None:
    """Every GPU gets runs of every network."""
    if options.gpus < 2:
        return None
    return (options.networks.index(job.network) * len(options.seeds) + options.seeds.index(job.seed)) % options.gpus


def stop(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """Ask a process to end, then end it."""
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def say(text: str, began: float) -> None:
    """Print with the time since the start."""
    print(f"[{time.monotonic() - began:5.0f} s] {text}", flush=True)


def tail(log: Path, lines: int = 25) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.is_file() else "(no log)"


def choose_steps(options: argparse.Namespace, began: float) -> int:
    """Optimiser steps that the slowest network makes in `options.seconds` while all runs train.

    Raises:
        SystemExit: a network does not train; its log is printed.
    """
    jobs = [
        Job(network, seed, PROBE_EPOCHS, options.work / "probe" / f"{network}-{seed}")
        for network in options.networks
        for seed in options.seeds
    ][: options.parallel]
    say(f"probing {len(jobs)} runs at once for {PROBE_EPOCHS} epochs", began)
    processes = {
        job: start(command(job, options), job.folder.with_suffix(".log"), gpu_of(job, options)) for job in jobs
    }
    limit = time.monotonic() + options.probe_limit
    try:
        while time.monotonic() < limit:
            waiting = [job for job in jobs if len(job.finished_epochs()) < PROBE_EPOCHS]
            failed = [job for job in waiting if processes[job].poll() not in (None, 0)]
            if failed:
                raise SystemExit(f"{failed[0].name} failed:\n{tail(failed[0].folder.with_suffix('.log'))}")
            if not waiting:
                break
            time.sleep(0.2)
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            stop(process)
    rates = {}
    for network in {job.network for job in jobs}:
        rows = [job.finished_epochs() for job in jobs if job.network == network]
        seconds = [float(row["seconds"]) for run in rows for row in run[len(run) // 2 :]]
        if not seconds:
            raise SystemExit(f"{network}: no epoch finished in {options.probe_limit:.0f} s; give --steps")
        rates[network] = steps_per_epoch(network) / statistics.mean(seconds)
        say(f"{network}: {rates[network]:.2f} steps/s a run", began)
    return int(options.seconds * min(rates.values()))


def run_job(job: Job, options: argparse.Namespace, deadline: float, began: float) -> dict[str, Any]:
    """Train one job, then score its best checkpoint on the test images."""
    log = job.folder.with_suffix(".log")
    started = time.monotonic()
    process = start(command(job, options), log, gpu_of(job, options))
    try:
        process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        stop(process)
    result: dict[str, Any] = {
        "network": job.network,
        "seed": job.seed,
        "epochs": job.epochs,
        "steps": job.epochs * steps_per_epoch(job.network),
        "finished_epochs": len(job.finished_epochs()),
        "seconds": round(time.monotonic() - started, 1),
    }
    say(f"{job.name}: trained {result['finished_epochs']} of {job.epochs} epochs", began)
    if process.returncode != 0:
        print(f"--- end of {log.name} (exit code {process.returncode})\n{tail(log)}", flush=True)
    words = [sys.executable, str(HERE / "polyp_score.py"), job.network, str(job.folder), str(options.output)]
    words += ["--sheet", str(SHEET_CASES)] if job.seed == options.seeds[0] else []
    scoring = start(words + [f"{key}={value}" for key, value in data_overrides(options).items()], log)
    if scoring.wait() != 0:
        print(f"--- end of {log.name}\n{tail(log)}", flush=True)
        return result
    scores = json.loads((job.folder / "test.json").read_text())
    say(
        f"{job.name}: "
        + ", ".join(f"{SETS[name]} {value:.3f}" for name, value in mean_by_set(scores["cases"], "dice").items()),
        began,
    )
    return result | scores


def mean_by_set(cases: list[dict[str, Any]], metric: str) -> dict[str, float]:
    """Mean of a metric over the cases of each data set, undefined values left out."""
    means = {}
    for name in SETS:
        values = [row[metric] for row in cases if row["case"].startswith(f"{name}/") and row[metric] is not None]
        if values:
            means[name] = statistics.mean(values)
    return means


def markdown(results: dict[str, Any]) -> str:
    """The tables: mean and sample standard deviation over seeds, then every run."""
    runs = [run for run in results["runs"] if run.get("cases")]
    counts = (
        {name: sum(row["case"].startswith(f"{name}/") for row in runs[0]["cases"]) for name in SETS} if runs else {}
    )
    heads = [f"{title}, {SETS[name]}" for name in SETS for title in COLUMNS.values()]
    lines = [f"| network | steps | {' | '.join(heads)} |", f"|---|---|{'---|' * len(heads)}"]
    for network in dict.fromkeys(run["network"] for run in runs):
        own = [run for run in runs if run["network"] == network]
        cells = []
        for name in SETS:
            for metric in COLUMNS:
                values = [mean_by_set(run["cases"], metric)[name] for run in own]
                digits = 1 if metric == "hd95" else 3
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {network} | {own[0]['steps']} | {' | '.join(cells)} |")
    lines += ["", "| run | epochs | best epoch | validation Dice | seconds | " + " | ".join(SETS.values()) + " |"]
    lines.append(f"|---|---|---|---|---|{'---|' * len(SETS)}")
    for run in runs:
        dice = mean_by_set(run["cases"], "dice")
        cells = [f"{run['finished_epochs']} of {run['epochs']}", str(run["best_epoch"]), f"{run['val_dice']:.3f}"]
        cells += [f"{run['seconds']:.0f}", *(f"{dice[name]:.3f}" for name in SETS)]
        lines.append(f"| {run['network']}, seed {run['seed']} | {' | '.join(cells)} |")
    about = results["about"]
    images = ", ".join(f"{count} {SETS[name]}" for name, count in counts.items())
    versions = f"Python {about['python']}, torch {about['torch']}, lightning {about['lightning']}, timm {about['timm']}"
    machine = f"{about['date']}, {about['gpus']} x {about['device']}, {about['parallel']} runs at once"
    lines += ["", f"{machine}; {versions}. Test images: {images}."]
    lines += [f"Command: `{about['command']}`."]
    return "\n".join(lines) + "\n"


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where and how the numbers were made."""
    import lightning
    import timm
    import torch

    length = f"--seconds {options.seconds:g}" if options.steps is None else f"--steps {options.steps}"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "gpus": options.gpus,
        "parallel": min(options.parallel, len(options.networks) * len(options.seeds)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "timm": timm.__version__,
        "command": f"python benchmarks/gpu_polyps.py run --data DATA --output OUT {length} "
        f"--gpus {options.gpus} --validate-every {options.validate_every}",
    }


def run(options: argparse.Namespace) -> None:
    """Train everything, score everything, write the tables."""
    began = time.monotonic()
    deadline = began + options.deadline
    options.output.mkdir(parents=True, exist_ok=True)
    steps = options.steps if options.steps is not None else choose_steps(options, began)
    jobs = [
        Job(network, seed, max(1, round(steps / steps_per_epoch(network))), options.work / f"{network}-{seed}")
        for network in options.networks
        for seed in options.seeds
    ]
    say(f"training {len(jobs)} runs, {options.parallel} at once, {steps} steps each", began)
    with ThreadPoolExecutor(options.parallel) as pool:
        runs = list(pool.map(lambda job: run_job(job, options, deadline, began), jobs))
    results = {"about": about(options), "runs": runs}
    (options.output / "results.json").write_text(json.dumps(results))
    (options.output / "results.md").write_text(markdown(results))
    print(markdown(results), flush=True)
    if any("cases" not in run for run in runs):
        raise SystemExit("some runs were not scored; see above")


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train, score, tabulate")
    training.add_argument("--data", type=Path, required=True)
    training.add_argument("--output", type=Path, required=True)
    training.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu_polyps", help="run folders and logs")
    training.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    training.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    training.add_argument("--steps", type=int, help="optimiser steps of each run; default: measured to fit --seconds")
    training.add_argument("--seconds", type=float, default=420, help="training time to fill")
    training.add_argument("--deadline", type=float, default=540, help="seconds after which training is stopped")
    training.add_argument("--probe-limit", type=float, default=150)
    training.add_argument("--parallel", type=int, default=9, help="runs at once")
    training.add_argument("--gpus", type=int, default=1, help="GPUs that share the runs")
    training.add_argument("--validate-every", type=int, default=1, metavar="N", help="validate every N epochs")
    training.add_argument("--workers", type=int, default=1, help="data processes of each run")
    training.add_argument("--size", type=int, help="another image size than the recipe's, for a rehearsal")
    training.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys of the recipes, for a rehearsal"
    )
    table = commands.add_parser("table", help="print the tables of a results.json")
    table.add_argument("results", type=Path)
    options = parser.parse_args()
    if options.command == "table":
        print(markdown(json.loads(options.results.read_text())))
    else:
        run(options)


if __name__ == "__main__":
    main()
