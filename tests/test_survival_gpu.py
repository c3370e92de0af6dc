"""Training in half precision, compiled and averaged, on a GPU."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch

from visattn import callbacks
from visattn.cli import main
from visattn.task import SegmentationTask


def run_fit(polyps: Path, run: Path, *more: str) -> int:
    words = ["fit", "--config", "polyp_pranet", "--run", str(run), "--data.root", str(polyps), "--data.size", "64"]
    words += ["--data.batch_size", "2", "--data.num_workers", "2", "--data.split.val", "0.34"]
    return main([*words, "--model.network.backbone", "resnet10t", "--trainer.max_epochs", "2", *more])


@pytest.mark.gpu
def test_gradients_that_overflow_in_half_precision_are_skipped(polyps, tmp_path, monkeypatch):
    step = SegmentationTask.training_step

    def overflowing(self, batch, index):
        outputs = step(self, batch, index)
        return {**outputs, "loss": outputs["loss"] * (1e6 if self.global_step == 1 else 1)}

    monkeypatch.setattr(SegmentationTask, "training_step", overflowing)
    assert run_fit(polyps, tmp_path / "run", "--trainer.precision", "16-mixed") == 0
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert content["MixedPrecision"]["scale"] < 65536
    assert all(torch.isfinite(value).all() for value in content["state_dict"].values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_a_stopped_run_goes_on_within_its_epoch(polyps, tmp_path, monkeypatch, precision):
    end = callbacks.TrainingProgress.on_train_batch_end

    def send(self, trainer, *args):
        if trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        end(self, trainer, *args)

    keys = ("--trainer.precision", precision, "--model.ema", "0.9")
    with monkeypatch.context() as patch:
        patch.setattr(callbacks.TrainingProgress, "on_train_batch_end", send)
        assert run_fit(polyps, tmp_path / "run", *keys) == 143
    assert run_fit(polyps, tmp_path / "run", *keys, "--ckpt_path", "last") == 0
    assert run_fit(polyps, tmp_path / "whole", *keys) == 0
    tables = [list(csv.DictReader((tmp_path / name / "metrics.csv").open())) for name in ("run", "whole")]
    for ours, whole in zip(*tables, strict=True):
        # The sums of some kernels depend on the order in which threads arrive.
        assert float(ours["train/loss"]) == pytest.approx(float(whole["train/loss"]), rel=0.02)
        assert ours["step"] == whole["step"]


@pytest.mark.gpu
def test_a_compiled_network_leaves_an_ordinary_checkpoint(polyps, tmp_path):
    assert run_fit(polyps, tmp_path / "run", "--model.compile", "true", "--trainer.max_epochs", "1") == 0
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert not [key for key in content["state_dict"] if "_orig_mod" in key]
    run = str(tmp_path / "run")
    assert main(["predict", str(polyps / "images"), "--checkpoint", run, "--output", str(tmp_path / "out")]) == 0
