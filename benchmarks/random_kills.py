"""Kills `visattn fit` or `visattn predict` at random moments with SIGKILL, and looks at what is left.

    python benchmarks/random_kills.py --count 100 fit
    python benchmarks/random_kills.py --count 100 predict

After each kill every file under its final name has to be whole: checkpoints load, tables, JSON, YAML and pictures
parse. The same command then goes on, is killed again, and so forth; what is finished in the end has to equal, bit for
bit, what a process that nobody killed made. A small network and a dozen drawn images keep a run at a few seconds.

The processes are forked from one that has imported everything, so that the kills hit the work and not the imports.
TensorBoard's files are left out: they are appended to, and their readers expect a cut end.
"""

import argparse
import csv
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from PIL import Image

import visattn.fit
import visattn.predict  # noqa: F401 (both for the forked processes)
from visattn.checkpoint import read_checkpoint
from visattn.cli import main as visattn_main
from visattn.data.phantom import write_phantom

SMALL = {
    "model.network.backbone": "resnet10t",
    "model.ema": "0.9",
    "data.size": "32",
    "data.batch_size": "2",
    "data.split.val": "0.34",
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": "3",
}


def start(arguments: list[str], log: Path) -> int:
    """Run a command in a forked process, which has a group of its own; its process number."""
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = 70
    try:
        code = visattn_main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], log: Path, kill_after: float | None = None) -> int | None:
    """The command's exit code, or None where it was killed."""
    process = start(arguments, log)
    until = time.monotonic() + (600 if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.002)


def damage(folder: Path) -> list[str]:
    """Files under their final names that are not whole."""
    bad = []
    readers: dict[str, Callable[[Path], object]] = {
        ".ckpt": read_checkpoint,
        ".json": lambda path: json.loads(path.read_text()),
        ".yaml": lambda path: yaml.safe_load(path.read_text())["model"],
        ".csv": read_table,
        ".png": lambda path: Image.open(path).load(),
        ".html": lambda path: path.read_text().rstrip().endswith("</html>") or path.read_text()[-1_000_000_000],
    }
    for path in folder.rglob("*"):
        known = path.suffix in readers and not path.name.startswith(".") and path.parent.name != "tensorboard"
        if known and path.is_file():
            try:
                readers[path.suffix](path)
            except Exception as error:  # whatever a reader says, the file is not whole
                bad.append(f"{path}: {type(error).__name__}: {error}")
    return bad


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a table without the column of seconds."""
    text = path.read_text()
    rows = list(csv.DictReader(text.splitlines()))
    if not text.endswith("\n") or any(None in row or None in row.values() for row in rows):
        raise ValueError("a row is cut")
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def differences(first: Path, second: Path) -> list[str]:
    """Files of two finished folders that differ in more than durations and their own paths."""
    found = []
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    names |= {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    for name in sorted(names):
        if name.suffix not in {".ckpt", ".csv", ".png"} or name.name == "curves.png":
            continue
        if not (first / name).is_file() or not (second / name).is_file():
            found.append(f"{name}: only in one")
        elif name.suffix == ".csv":
            if read_table(first / name) != read_table(second / name):
                found.append(f"{name}: rows differ")
        elif name.suffix == ".png":
            if (first / name).read_bytes() != (second / name).read_bytes():
                found.append(f"{name}: bytes differ")
        else:
            contents = [torch.load(folder / name, weights_only=True) for folder in (first, second)]
            keys = ("state_dict", "visattn_raw", "optimizer_states", "lr_schedulers", "global_step", "epoch")
            found += [f"{name}: {key} differs" for key in keys if not equal(*(c[key] for c in contents))]
    return found


def equal(first: object, second: object) -> bool:
    """Equal to the last bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(equal(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return isinstance(second, list | tuple) and len(first) == len(second) and all(map(equal, first, second))
    return first == second


def fit_arguments(data: Path, folder: Path, workers: int) -> list[str]:
    """The command that trains in `folder`, from the beginning or from where it was killed."""
    arguments = ["fit", "--config", "polyp_pranet", "--run", str(folder), "--data.root", str(data)]
    for key, value in {**SMALL, "data.num_workers": str(workers)}.items():
        arguments += [f"--{key}", value]
    begun = (folder / "checkpoints" / "last.ckpt").is_file()
    return [*arguments, "--ckpt_path", "last"] if begun else arguments


def main() -> int:
    """Kill, look, continue, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("fit", "predict"))
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    torch.set_num_threads(1)
    moments = random.Random(options.seed)
    failures: list[str] = []
    kills = finished = 0
    with tempfile.TemporaryDirectory(prefix="random-kills-") as name:
        root = Path(name)
        log = root / "log.txt"
        write_phantom(root / "data", 12, seed=5, size=(64, 80))
        reference = root / "whole"
        started = time.monotonic()
        if run(fit_arguments(root / "data", reference, 0), log) != 0:
            print(log.read_text()[-2000:])
            return 1
        if options.command == "predict":
            write_phantom(root / "photos", 60, seed=6, size=(96, 112))
            checkpoint, reference = reference, root / "masks"
            base = ["predict", str(root / "photos" / "images"), "--checkpoint", str(checkpoint), "--device", "cpu"]
            base += ["--overlays"]
            started = time.monotonic()
            run([*base, "--output", str(reference)], log)
        length = time.monotonic() - started
        print(f"{options.command}: an uninterrupted run takes {length:.1f} s", flush=True)
        while kills < options.count and not failures:
            folder = root / f"run-{finished}"
            if options.command == "fit":
                arguments = fit_arguments(root / "data", folder, workers=moments.randrange(3))
            else:
                arguments = [*base, "--output", str(folder)]
            code = run(arguments, log, kill_after=moments.uniform(0, length))
            failures += damage(folder)
            if code is None:
                kills += 1
                continue
            if code != 0:
                failures.append(f"exit code {code}:\n{log.read_text()[-3000:]}")
            else:
                failures += differences(reference, folder)
            finished += 1
            print(f"{kills} kills, {finished} runs finished", flush=True)
    print(
        f"{options.command}: {kills} kills, {finished} finished runs equal to the uninterrupted one"
        if not failures
        else "\n".join(failures)
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
