"""Training on volumes from a recipe, end to end."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from visattn.checkpoint import read_checkpoint
from visattn.cli import main
from visattn.data import nifti
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.labels import Labels
from visattn.metrics import case_metrics

AFFINE = np.array([[0.0, -1.1, 0.1, 7], [-0.9, 0.0, 0.0, 3], [0.0, 0.1, 1.4, -5], [0, 0, 0, 1]])
SMALL = {
    "data.labels": "{background: 0, front: 1, back: 4}",
    "data.spacing": "median",
    "data.patch": "[16, 16, 16]",
    "data.batch_size": "2",
    "data.iterations_per_epoch": "4",
    "data.num_workers": "0",
    "data.split": "{val: 0.25}",
    "model.network": "{name: unet3d, filters: [4, 8, 8], deep_supervision: true}",
    "model.loss": "{name: dice_ce, deep_supervision: [1.0]}",
    "trainer.max_epochs": "2",
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
}


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("volumes")
    for index in range(8):
        rng = np.random.default_rng(index)
        shape = tuple(int(n) for n in rng.integers(14, 20, 3))
        label = np.zeros(shape, np.uint8)
        i, j, k = (int(n) for n in rng.integers(3, 6, 3))
        label[i : i + 6, j : j + 4, k : k + 5] = 1
        label[i : i + 6, j + 4 : j + 7, k : k + 5] = 4
        image = (100 + 30 * label + rng.normal(0, 5, shape)).astype(np.float32)
        for kind, array in (("imagesTr", image), ("labelsTr", label)):
            (folder / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, AFFINE), folder / kind / f"case_{index}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def run_fit(volumes: Path, cache: Path, run: Path, *more: str, **keys: str) -> int:
    words = ["fit", "--config", "hippocampus_unet3d", "--run", str(run), "--data.root", str(volumes)]
    for key, value in {"data.cache_dir": str(cache), **SMALL, **keys}.items():
        words += [f"--{key}", value]
    return main([*words, *more])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def run(volumes, cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert run_fit(volumes, cache, folder) == 0
    return folder


@pytest.mark.slow  # trains
def test_the_run_folder_is_complete_and_its_masks_are_what_was_scored(run, volumes):
    for name in ("config.yaml", "metrics.csv", "cases.csv", "summary.json", "splits.json", "inputs.json"):
        assert (run / name).stat().st_size > 0, name
    epochs = rows_of(run / "metrics.csv")
    assert float(epochs[1]["val/loss"]) < float(epochs[0]["val/loss"])
    labels = Labels.from_config({"background": 0, "front": 1, "back": 4})
    rows = rows_of(run / "cases.csv")
    assert {row["class"] for row in rows} == {"front", "back"}
    for entry in json.loads((run / "inputs.json").read_text())["cases"]:
        assert Path(entry["image"]) == volumes / "imagesTr" / f"{entry['case']}.nii.gz"
        values, geometry = nifti.read_labels(run / entry["prediction"])
        truth, own = nifti.read_labels(volumes / "labelsTr" / f"{entry['case']}.nii.gz")
        assert np.array_equal(geometry.affine, own.affine)
        scores = case_metrics(
            labels.encode(values, "p"), labels.encode(truth, "t"), labels, suite="volume",
            spacing=own.zooms, voxel_ml=own.voxel_ml,
        )  # fmt: skip
        for score, row in zip(scores, [row for row in rows if row["case"] == entry["case"]], strict=True):
            for name in ("dice", "hd95", "nsd", "volume_error", "lesion_f1"):
                assert (
                    score[name] is None if row[name] == "" else score[name] == pytest.approx(float(row[name]), rel=1e-4)
                )
    checkpoint = read_checkpoint(run / "checkpoints" / "best.ckpt")
    preprocessing = VolumePreprocessing.from_config(checkpoint.preprocessing)
    assert preprocessing.spacing == pytest.approx((1.1, 0.9, 1.4), abs=0.02)
    assert checkpoint.network["in_channels"] == 1


@pytest.mark.slow  # trains
def test_validate_repeats_the_scores_and_predict_gives_the_masks(run, tmp_path):
    assert main(["validate", "--config", str(run / "config.yaml"), "--run", str(run)]) == 0
    assert rows_of(run / "validate" / "cases.csv") == rows_of(run / "cases.csv")
    scored = json.loads((run / "inputs.json").read_text())["cases"]
    images = [entry["image"] for entry in scored]
    assert main(["predict", *images, "--checkpoint", str(run), "--output", str(tmp_path), "--device", "cpu"]) == 0
    for entry in scored:
        (written,) = tmp_path.rglob(f"{entry['case']}*mask.nii.gz")
        assert np.array_equal(nifti.read_labels(written)[0], nifti.read_labels(run / entry["prediction"])[0])


@pytest.mark.slow  # trains
@pytest.mark.parametrize(
    "keys",
    [{}, {"trainer.accumulate_grad_batches": "2", "model.ema": "0.9", "trainer.precision": "bf16-mixed"}],
    ids=["plain", "accumulated"],
)
def test_stopped_and_continued_equals_uninterrupted(volumes, cache, tmp_path, monkeypatch, keys):
    import os
    import signal

    from visattn import callbacks

    for name in ("write_report", "write_curves", "write_overlays"):
        monkeypatch.setattr(f"visattn.results.{name}", lambda *args: None)
    assert run_fit(volumes, cache, tmp_path / "whole", **keys) == 0
    with monkeypatch.context() as patch:
        real = callbacks.RandomState.on_train_batch_start

        def send(self, trainer, module, batch, index):
            if (trainer.current_epoch, index) == (1, 2):
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, trainer, module, batch, index)

        patch.setattr(callbacks.RandomState, "on_train_batch_start", send)
        assert run_fit(volumes, cache, tmp_path / "broken", **keys) == 143
    assert run_fit(volumes, cache, tmp_path / "broken", "--ckpt_path", "last", **keys) == 0
    whole, broken = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "broken")
    )
    assert whole["global_step"] == broken["global_step"]
    for key, value in whole["state_dict"].items():
        assert torch.equal(value, broken["state_dict"][key]), key
    assert rows_of(tmp_path / "whole" / "cases.csv") == rows_of(tmp_path / "broken" / "cases.csv")


@pytest.mark.slow  # trains two folds
def test_folds_and_regions(volumes, cache, tmp_path):
    keys = {"data.regions": "{whole: [front, back], back: [back]}", "trainer.max_epochs": "1", "data.split": "{}"}
    assert run_fit(volumes, cache, tmp_path / "cv", "--folds", "all", "--data.folds", "2", **keys) == 0
    rows = rows_of(tmp_path / "cv" / "cases.csv")
    assert {row["class"] for row in rows} == {"whole", "back"}
    assert len({row["case"] for row in rows}) == 8


def test_a_network_of_the_other_rank_is_refused(volumes, cache, polyps, tmp_path, capsys):
    flat = {"model.network": "{name: unet3d, dims: 2, filters: [4, 8]}", "model.loss": "{name: dice_ce}"}
    assert run_fit(volumes, cache, tmp_path / "a", **flat) == 2
    assert "'unet3d' takes images (2 axes), the data are volumes (3 axes)" in capsys.readouterr().err
    words = ["fit", "--config", "polyp_pranet", "--data.root", str(polyps), "--run", str(tmp_path / "b")]
    deep = ["--model.network", "{name: unet3d, filters: [4, 8]}", "--trainer.precision", "32-true"]
    assert main([*words, *deep, "--data.size", "64"]) == 2
    assert "'unet3d' takes volumes (3 axes), the data are images (2 axes)" in capsys.readouterr().err


def test_a_pretrained_network_that_has_no_weights_is_refused(volumes, cache, tmp_path, capsys):
    keys = {"model.network": "{name: unet3d, filters: [4, 8], pretrained: true}", "model.loss": "{name: dice_ce}"}
    assert run_fit(volumes, cache, tmp_path / "a", **keys) == 2
    assert "has no argument 'pretrained'" in capsys.readouterr().err
