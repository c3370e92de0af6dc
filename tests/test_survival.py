"""Runs that are stopped, continued and compared with runs that were not."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from visattn import callbacks
from visattn.cli import main

SMALL = {
    "model.network.backbone": "resnet10t",
    "data.size": "32",
    "data.batch_size": "2",
    "data.num_workers": "0",
    "data.split.val": "0.34",
    "data.augment": "[{name: flip_horizontal}]",
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": "2",
}


def arguments(polyps: Path, run: Path, **keys: str) -> list[str]:
    """A training of 8 images in batches of 2, validated on 4; `keys` with __ for the dot win."""
    words = ["fit", "--config", "polyp_pranet", "--run", str(run), "--data.root", str(polyps)]
    for key, value in {**SMALL, **{key.replace("__", "."): value for key, value in keys.items()}}.items():
        words += [f"--{key}", value]
    return words


def run_fit(polyps: Path, run: Path, resume: bool = False, **keys: str) -> int:
    return main([*arguments(polyps, run, **keys), *(["--ckpt_path", "last"] if resume else [])])


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
        # The number of the batch is the last argument, but for validation's, whose loader comes after it.
        index = None if batch is None else args[2] if hook.startswith("on_validation") else args[-1]
        if not sent and trainer.current_epoch == epoch and index == batch:
            sent.append(True)
            os.kill(os.getpid(), number)
        return original(self, trainer, *args, **kwargs)

    monkeypatch.setattr(owner, hook, send)


@pytest.fixture(scope="module")
def wholes(polyps, tmp_path_factory):
    """Uninterrupted runs by their keys, each made once."""
    made: dict[tuple[tuple[str, str], ...], Path] = {}

    def make(**keys: str) -> Path:
        folder = made.get(tuple(keys.items()))
        if folder is None:
            folder = made[tuple(keys.items())] = tmp_path_factory.mktemp("whole") / "run"
            assert run_fit(polyps, folder, **keys) == 0
        return folder

    return make


def stop_and_continue(polyps, run, monkeypatch, capsys, at, **keys: str) -> str:
    """Stop a run at a point, continue it to the end; what the stopped one said."""
    with monkeypatch.context() as patch:
        send_at(patch, *at)
        capsys.readouterr()
        assert run_fit(polyps, run, **keys) == 143
    said = capsys.readouterr().err
    assert "stopped by SIGTERM" in said
    saved = (run / "checkpoints/last.ckpt").is_file()
    assert saved == ("--ckpt_path last" in said)
    torch.manual_seed(4)  # whatever happens in between must not matter
    # More loading processes than before: they ask for batches ahead, and must change nothing.
    assert run_fit(polyps, run, resume=saved, **{**keys, "data__num_workers": "2"}) == 0
    return said


def test_stopped_within_an_epoch_and_continued_equals_uninterrupted(wholes, polyps, tmp_path, monkeypatch, capsys):
    at = ("on_train_batch_end", 1, 1)
    said = stop_and_continue(polyps, tmp_path / "run", monkeypatch, capsys, at)
    assert "holds epoch 2, step 6" in said
    assert_equal_runs(wholes(), tmp_path / "run")


@pytest.mark.slow  # a few seconds for each point
@pytest.mark.parametrize(
    ("at", "keys"),
    [
        (("on_sanity_check_start", 0, None), {}),
        (("on_train_batch_start", 0, 0), {}),
        (("on_train_batch_end", 1, 3), {}),
        (("on_validation_batch_start", 0, 1), {}),
        (("on_validation_epoch_end", 1, None), {}),
        (("on_train_epoch_end", 0, None), {}),
        (("on_train_epoch_end", 1, None), {}),
        (("on_train_batch_end", 1, 0), {"model__ema": "0.9", "model__schedule": "{name: poly, warmup_epochs: 1}"}),
        (("on_validation_batch_start", 1, 0), {"model__ema": "0.9"}),
        (("on_train_batch_end", 0, 0), {"trainer__accumulate_grad_batches": "2"}),
        (("on_train_batch_end", 0, 2), {"trainer__accumulate_grad_batches": "3"}),
        (("on_train_batch_end", 1, 1), {"trainer__val_check_interval": "0.5"}),
        (("on_validation_batch_start", 1, 0), {"trainer__val_check_interval": "0.5"}),
        (("on_train_batch_end", 1, 0), {"trainer__check_val_every_n_epoch": "2"}),
        (("on_train_batch_end", 1, 0), {"trainer__max_steps": "6"}),
        (("on_train_epoch_end", 0, None), {"trainer__max_steps": "6"}),
        (("on_train_batch_end", 1, 1), {"data__scales": "[0.75, 1]", "data__size": "64"}),
    ],
)
def test_wherever_it_is_stopped(wholes, polyps, tmp_path, monkeypatch, capsys, at, keys):
    stop_and_continue(polyps, tmp_path / "run", monkeypatch, capsys, at, **keys)
    assert_equal_runs(wholes(**keys), tmp_path / "run")


def start(polyps: Path, run: Path, log: Path, **keys: str) -> subprocess.Popen[bytes]:
    """The command in a session of its own, as a shell or a scheduler starts it."""
    environment = {key: value for key, value in os.environ.items() if key not in {"VISATTN_RUN", "LOCAL_RANK"}}
    words = [sys.executable, "-m", "visattn", *arguments(polyps, run, **keys)]
    with log.open("wb") as handle:
        return subprocess.Popen(words, stderr=handle, start_new_session=True, env=environment)


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 200
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


LONG = {"trainer__max_epochs": "500"}  # stopped long before


@pytest.mark.slow  # starts processes, which import lightning
@pytest.mark.parametrize(
    ("number", "group", "code"),
    [(signal.SIGTERM, True, 143), (signal.SIGUSR1, False, 143), (signal.SIGINT, True, 130)],
    ids=["SIGTERM to the group", "SIGUSR1", "Ctrl-C"],
)
def test_a_command_with_loading_processes_saves_and_says_so(polyps, tmp_path, number, group, code):
    """A scheduler's SIGTERM and Ctrl-C reach the loaders too, which must not take the training down."""
    log = tmp_path / "log"
    process = start(polyps, tmp_path / "run", log, data__num_workers="2", data__cache="false", **LONG)
    wait_for(log, "epoch 2/500", process)
    (os.killpg if group else os.kill)(process.pid, number)
    assert process.wait(60) == code, log.read_text()
    error = log.read_text()
    assert f"stopped by {signal.Signals(number).name}" in error
    assert "--ckpt_path last" in error
    assert "Traceback" not in error
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] >= 8


@pytest.mark.slow  # two processes import lightning, twice
@pytest.mark.parametrize("group", [False, True], ids=["first process", "all processes"])
def test_two_processes_stop_at_the_same_step_and_go_on(polyps, tmp_path, group):
    log, keys = tmp_path / "log", {"trainer__devices": "2", "data__num_workers": "1"}
    process = start(polyps, tmp_path / "run", log, **keys, **LONG)
    wait_for(log, "epoch 2/500", process)
    (os.killpg if group else os.kill)(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143, log.read_text()
    error = log.read_text()
    assert error.count("stopped by SIGTERM") == 1
    assert "Traceback" not in error
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert len(content["visattn_epoch"]["sums"]) == 2
    epochs = str(content["epoch"] + 2)
    words = [*arguments(polyps, tmp_path / "run", **keys, trainer__max_epochs=epochs), "--ckpt_path", "last"]
    result = subprocess.run([sys.executable, "-m", "visattn", *words], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "run/metrics.csv")
    assert [int(row["step"]) for row in rows] == [2 * (index + 1) for index in range(int(epochs))]


@pytest.mark.slow  # a run, and the end of another
def test_a_run_that_stopped_early_goes_on_to_its_report_only(wholes, polyps, tmp_path, monkeypatch, capsys):
    stop = "[{class_path: EarlyStopping, init_args: {monitor: val/loss, patience: 1, min_delta: 100.0}}]"
    keys = {"trainer__callbacks": stop, "trainer__max_epochs": "5"}
    whole = wholes(**keys)
    assert "stopped early after epoch 2: Monitored metric val/loss did not improve" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("visattn.results.write_results", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
        assert run_fit(polyps, tmp_path / "run", **keys) == 143
    assert "--ckpt_path last" in capsys.readouterr().err
    assert not (tmp_path / "run/cases.csv").exists()
    assert run_fit(polyps, tmp_path / "run", resume=True, **keys) == 0
    assert_equal_runs(whole, tmp_path / "run")
    assert len(rows_of(whole / "metrics.csv")) == 2


@pytest.mark.slow  # trains
def test_the_schedule_counts_optimiser_steps(wholes):
    rows = rows_of(wholes(trainer__accumulate_grad_batches="2", model__schedule="{name: cosine}") / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    assert float(rows[1]["lr"]) == pytest.approx(float(rows[0]["lr"]) / 2)


@pytest.mark.slow  # trains two epochs
def test_a_disk_that_fills_up_leaves_the_checkpoint_before_and_names_the_file(polyps, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def full(content, handle):
        calls.append(handle)
        if len(calls) > 2:  # best and last of the first epoch
            handle.write(b"PK half")
            raise OSError(28, "No space left on device")
        save(content, handle)

    monkeypatch.setattr(torch, "save", full)
    assert run_fit(polyps, tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "last.ckpt: the checkpoint cannot be written: No space left on device" in error
    assert "Traceback" not in error
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["best.ckpt", "last.ckpt"]
    monkeypatch.undo()
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    assert run_fit(polyps, tmp_path / "run", resume=True) == 0


@pytest.mark.slow  # trains two epochs
def test_what_is_scored_and_predicted_is_the_average(wholes):
    run = wholes(model__ema="0.9")
    content = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    average, raw = (
        {k: v for k, v in content[key].items() if k.startswith("network.")} for key in ("state_dict", "visattn_raw")
    )
    assert average.keys() == raw.keys()
    assert not any(torch.equal(average[key], raw[key]) for key in raw if key.endswith("conv2.weight"))


@pytest.mark.slow  # compiles
def test_a_compiler_that_fails_names_its_key(polyps, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHDYNAMO_SUPPRESS_ERRORS", "0")

    def broken(graph, inputs):
        raise OSError("no compiler")

    from torch import nn

    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_with(self, backend=broken))
    assert run_fit(polyps, tmp_path / "run", model__compile="true") == 2
    assert "model.compile: torch.compile failed" in capsys.readouterr().err
