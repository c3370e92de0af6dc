"""Cross-validation for real: tiny networks are trained, killed, continued, and predict together."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import visattn
from visattn.cli import main
from visattn.metrics import summarise

pytestmark = pytest.mark.slow  # every fold is a process that imports torch and trains

SMALL = ["--model.network.backbone", "resnet10t", "--model.network.pretrained", "false", "--data.size", "64"]
SMALL += ["--data.batch_size", "4", "--data.num_workers", "0", "--trainer.precision", "32-true"]
SMALL += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--data.folds", "2", "--data.split.test", "0.2"]


def words(polyps: Path, run: Path) -> list[str]:
    return ["fit", "--config", "polyp_pranet", "--data.root", str(polyps), *SMALL, "--run", str(run), "--folds", "all"]


def start(polyps: Path, run: Path, *more: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "visattn", *words(polyps, run), *more])


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None
        time.sleep(0.02)
    raise AssertionError(f"{path} never appeared")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def weights(run: Path, number: int) -> dict[str, torch.Tensor]:
    content = torch.load(run / f"fold-{number}" / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = content["state_dict"]
    return state


@pytest.fixture(scope="module")
def whole(polyps, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("folds") / "whole"
    assert start(polyps, run).wait(600) == 0
    return run


def test_every_case_is_scored_by_the_network_that_did_not_see_it(whole, polyps):
    splits = json.loads((whole / "splits.json").read_text())
    pooled = rows_of(whole / "cases.csv")
    assert sorted(row["case"] for row in pooled) == sorted(name for split in splits for name in split["val"])
    parts = [rows_of(whole / f"fold-{number}" / "cases.csv") for number in range(2)]
    assert pooled == [row for part in parts for row in part]
    for number, (split, part) in enumerate(zip(splits, parts, strict=True)):
        assert {row["case"] for row in part} == set(split["val"])
        assert json.loads((whole / f"fold-{number}" / "splits.json").read_text()) == split
        assert not set(split["val"]) & {*split["train"], *split["test"]}
    summary = json.loads((whole / "summary.json").read_text())
    dice = next(entry for entry in summary["metrics"] if entry["metric"] == "dice")
    expected = next(entry for entry in summarise(pooled) if entry.metric == "dice")
    assert (dice["mean"], dice["low"], dice["high"]) == (expected.mean, expected.low, expected.high)
    for entry in json.loads((whole / "inputs.json").read_text())["cases"]:
        assert (whole / entry["prediction"]).is_file()
    assert (whole / "report.html").stat().st_size > 10_000
    assert list((whole / "overlays").glob("worst-*.png"))


def test_the_ensemble_is_the_mean_of_its_members_bit_for_bit(whole, polyps, tmp_path):
    ensemble = visattn.load(whole, device="cpu")
    members = [visattn.load(whole / f"fold-{number}", device="cpu") for number in range(2)]
    assert main(["predict", str(polyps / "images"), "--checkpoint", str(whole), "--output", str(tmp_path),
                 "--device", "cpu", "--probabilities"]) == 0  # fmt: skip
    for path in sorted((polyps / "images").iterdir())[:4]:
        single = np.stack([member.predict_proba(path) for member in members])
        assert not np.array_equal(*single)
        mean = single.mean(axis=0, dtype=np.float32)
        np.testing.assert_array_equal(ensemble.predict_proba(path), mean)
        written = np.asarray(Image.open(tmp_path / f"{path.stem}.png"))
        np.testing.assert_array_equal(written, (mean[0] >= 0.5) * 255)


@pytest.mark.timeout(600)  # two commands that train, one of them twice
def test_a_run_that_is_stopped_ends_as_one_that_is_not(whole, polyps, tmp_path):
    run = tmp_path / "broken"
    process = start(polyps, run)
    wait_for(run / "fold-0" / "checkpoints" / "last.ckpt", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert not (run / "summary.json").exists()
    assert start(polyps, run, "--ckpt_path", "last").wait(500) == 0
    for number in range(2):
        first, second = weights(whole, number), weights(run, number)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert (run / "cases.csv").read_bytes() == (whole / "cases.csv").read_bytes()
