"""Runs that are stopped, continued and compared with runs that were not."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch

from visattn import callbacks
from visattn.cli import main

SMALL = [
    *"--model.network.backbone resnet10t --data.size 32 --data.batch_size 2 --data.num_workers 0".split(),
    *"--data.split.val 0.34 --trainer.precision 32-true --trainer.accelerator cpu --trainer.max_epochs 2".split(),
    *("--data.augment", "[{name: flip_horizontal}]"),
]


def run_fit(polyps: Path, run: Path, *more: str) -> int:
    return main(["fit", "--config", "polyp_pranet", "--run", str(run), "--data.root", str(polyps), *SMALL, *more])


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Reports have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_report", "write_curves", "_write_overlays"):
            patch.setattr(f"visattn.results.{name}", lambda *args: None, raising=False)
        yield


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return [{**row, "seconds": ""} for row in csv.DictReader(handle)]


def same(first: object, second: object, where: str = "") -> None:
    """Equal to the last bit, all the way down."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            same(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            same(a, b, f"{where}[{index}]")
    else:
        assert first == second, where


def assert_equal_runs(whole: Path, broken: Path) -> None:
    for name in ("last", "best"):
        first, second = (torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True) for run in (whole, broken))
        for key in (
            "state_dict",
            "optimizer_states",
            "lr_schedulers",
            "global_step",
            "epoch",
            "visattn_epoch",
            "loops",
        ):
            if key == "loops":
                for part in ("epoch_progress", "epoch_loop.batch_progress"):
                    same(first[key]["fit_loop"][part]["current"], second[key]["fit_loop"][part]["current"], part)
            else:
                same(first.get(key), second.get(key), f"{name}.{key}")
        same(first.get("visattn_raw"), second.get("visattn_raw"), "raw")
    assert rows_of(whole / "metrics.csv") == rows_of(broken / "metrics.csv")
    assert (whole / "cases.csv").read_bytes() == (broken / "cases.csv").read_bytes()


def send_at(monkeypatch, hook: str, epoch: int, batch: int | None, number: int = signal.SIGTERM) -> None:
    """Send a signal to this very process from within a hook of the progress bar, once."""
    owner = callbacks.TrainingProgress
    original = getattr(owner, hook)
    sent = []

    def send(self, trainer, *args, **kwargs):
        index = args[-1] if batch is not None else None
        if hook.startswith("on_validation") and batch is not None:
            index = args[2]
        if not sent and trainer.current_epoch == epoch and index == batch and not trainer.sanity_checking:
            sent.append(True)
            os.kill(os.getpid(), number)
        return original(self, trainer, *args, **kwargs)

    monkeypatch.setattr(owner, hook, send)


@pytest.fixture(scope="module")
def whole(polyps, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_fit(polyps, folder) == 0
    return folder


@pytest.mark.parametrize(
    ("hook", "epoch", "batch"),
    [
        ("on_train_batch_start", 0, 0),
        ("on_train_batch_end", 0, 1),
        ("on_train_batch_end", 1, 3),
        ("on_validation_batch_start", 0, 1),
        ("on_validation_epoch_end", 1, None),
        ("on_train_epoch_end", 0, None),
        ("on_train_epoch_end", 1, None),
    ],
)
def test_stopped_and_continued_equals_uninterrupted(whole, polyps, tmp_path, monkeypatch, capsys, hook, epoch, batch):
    send_at(monkeypatch, hook, epoch, batch)
    assert run_fit(polyps, tmp_path / "run") == 143
    monkeypatch.undo()
    error = capsys.readouterr().err
    assert "stopped by SIGTERM" in error
    print(error)
    more = ["--ckpt_path", "last"] if (tmp_path / "run/checkpoints/last.ckpt").is_file() else []
    assert bool(more) == ("--ckpt_path last" in error)
    torch.manual_seed(4)
    assert run_fit(polyps, tmp_path / "run", *more) == 0
    assert_equal_runs(whole, tmp_path / "run")
