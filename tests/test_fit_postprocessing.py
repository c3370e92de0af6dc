"""The steps of a recipe change what is scored, ride in the checkpoint, and change what is predicted alike."""

import json

import nibabel
import numpy as np
import pytest

from visattn.checkpoint import read_checkpoint
from visattn.cli import main
from visattn.data import nifti
from visattn.errors import UserError

KEYS = {
    "data.labels": "{background: 0, thing: 3}",
    "data.patch": "[16, 16, 16]",
    "data.batch_size": "2",
    "data.iterations_per_epoch": "3",
    "data.num_workers": "0",
    "data.split": "{val: 0.5}",
    "data.augment": "null",
    "model.network": "{name: unet3d, filters: [4, 8]}",
    "model.loss": "{name: dice_ce}",
    "trainer.max_epochs": "1",
    "trainer.precision": "32-true",
    "trainer.accelerator": "cpu",
}


def words(tmp_path, steps):
    """Arguments of fit, on volumes of noise, where a barely trained network leaves many specks."""
    for number in range(4):
        rng = np.random.default_rng(number)
        label = (rng.random((14, 15, 16)) > 0.7) * np.uint8(3)
        for kind, array in (("imagesTr", 40 * label + rng.normal(0, 5, label.shape)), ("labelsTr", label)):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            path = tmp_path / "set" / kind / f"c{number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.diag([1.0, 1.0, 2.0, 1.0])), path)
    given = {**KEYS, "data.root": str(tmp_path / "set"), "data.cache_dir": str(tmp_path / "c")}
    given["model.postprocess"] = steps
    pairs = [word for key, value in given.items() for word in (f"--{key}", value)]
    return ["fit", "--config", "hippocampus_unet3d", "--run", str(tmp_path / "run"), *pairs]


@pytest.mark.slow  # trains
def test_what_is_scored_is_what_predict_writes(tmp_path):
    assert main(words(tmp_path, "[{name: remove_small, ml: 0.1}, fill_holes]")) == 0
    run = tmp_path / "run"
    steps = read_checkpoint(run / "checkpoints" / "best.ckpt").postprocessing["steps"]
    assert steps == [{"name": "remove_small", "ml": 0.1}, {"name": "fill_holes"}]
    scored = json.loads((run / "inputs.json").read_text())["cases"]
    images = [entry["image"] for entry in scored]
    out = tmp_path / "out"
    assert main(["predict", *images, "--checkpoint", str(run), "--output", str(out), "--device", "cpu"]) == 0
    for entry in scored:
        mask = nifti.read_labels(out / f"{entry['case']}_mask.nii.gz")[0]
        assert np.array_equal(mask, nifti.read_labels(run / entry["prediction"])[0])
    # Without the steps the same weights give other masks.
    again = ["validate", "--config", str(run / "config.yaml"), "--run", str(run)]
    assert main([*again, "--model.postprocess", "[{name: remove_small, ml: 1000}]"]) == 0
    for entry in json.loads((run / "validate" / "inputs.json").read_text())["cases"]:
        assert not nifti.read_labels(run / "validate" / entry["prediction"])[0].any()


@pytest.mark.parametrize("steps", ["[{name: keep_larges}]", "[{name: keep_largest, labels: [thin]}]"])
def test_a_mistake_is_told_before_anything_is_trained(tmp_path, capsys, steps):
    assert main(words(tmp_path, steps)) == 2
    error = capsys.readouterr().err
    assert "model.postprocess[0]" in error
    assert "Did you mean" in error
    assert not (tmp_path / "run").exists()


def test_steps_of_a_damaged_checkpoint_are_refused(tmp_path):
    from types import SimpleNamespace

    from visattn.members import parse_postprocessing

    for steps in (3, [{"name": "run"}], [{"name": "keep_largest", "labels": [4]}], {"name": "keep_largest"}):
        fake = SimpleNamespace(
            path="c.ckpt", labels={"labels": {"a": 0, "b": 1}}, preprocessing={}, postprocessing={"steps": steps}
        )
        with pytest.raises(UserError, match="damaged checkpoint"):
            parse_postprocessing(fake)
