"""A run with folds predicts as one: the mean of its networks' probabilities."""

import json

import numpy as np
import pytest
from predict_fakes import manifest, mask, save_image, tree, write_checkpoint

import visattn
from visattn.checkpoint import export_weights
from visattn.cli import main
from visattn.errors import UserError
from visattn.folds_file import Folds, write_folds
from visattn.predict import predict_folder

SHIFTS = (-7.3, 0.9, 4.1)


def write_run(folder, shifts=SHIFTS, **options):
    folder.mkdir(parents=True)
    write_folds(Folds(folder, len(shifts), "demo", "00"), [{"train": [], "val": [], "test": []}] * len(shifts))
    for number, shift in enumerate(shifts):
        (folder / f"fold-{number}" / "checkpoints").mkdir(parents=True)
        write_checkpoint(folder / f"fold-{number}" / "checkpoints" / "best.ckpt", shift=shift, **options)
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def members(run):
    return [visattn.load(run / f"fold-{number}", device="cpu") for number in range(3)]


@pytest.mark.parametrize("tta", ["none", "flips"])
def test_probabilities_are_the_mean_of_the_members_bit_for_bit(run, tmp_path, tta):
    save_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (23, 31)).astype(np.uint8))
    single = [member.predict_proba(tmp_path / "a.png", tta) for member in members(run)]
    assert len({probability.tobytes() for probability in single}) == 3
    ensemble = visattn.load(run, device="cpu")
    expected = np.stack(single).mean(axis=0, dtype=np.float32)
    np.testing.assert_array_equal(ensemble.predict_proba(tmp_path / "a.png", tta), expected)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(ensemble.predict(tmp_path / "a.png", tta), (expected[0] >= 0.5) * 255)
    assert not np.array_equal(ensemble.predict(tmp_path / "a.png"), members(run)[0].predict(tmp_path / "a.png"))
    assert "x 3 folds" in repr(ensemble)
    assert len(ensemble.networks) == 3
    with pytest.raises(UserError, match="use networks"):
        _ = ensemble.network


def test_the_largest_mean_probability_wins_among_several_classes(tmp_path):
    save_image(tmp_path / "a.png", np.random.default_rng(1).integers(0, 256, (16, 16)).astype(np.uint8))
    run = write_run(tmp_path / "run", (0.3, -0.35, -0.4), labels={"background": 0, "rim": 7, "core": 9})
    single = [member.predict(tmp_path / "a.png") for member in members(run)]
    ensemble = visattn.load(run, device="cpu")
    expected = np.stack([member.predict_proba(tmp_path / "a.png") for member in members(run)]).mean(0)
    np.testing.assert_array_equal(ensemble.predict(tmp_path / "a.png"), np.array([0, 7, 9])[expected.argmax(0)])
    assert not any(np.array_equal(ensemble.predict(tmp_path / "a.png"), values) for values in single)


def test_the_command_writes_what_the_ensemble_predicts_and_its_record_covers_every_fold(run, tmp_path, capsys):
    for seed in range(3):
        save_image(tmp_path / "in" / f"{seed}.png", seed=seed, size=(20, 28))
    arguments = ["predict", str(tmp_path / "in"), "--checkpoint", str(run), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu"]) == 0
    ensemble = visattn.load(run, device="cpu")
    for seed in range(3):
        expected = ensemble.predict(tmp_path / "in" / f"{seed}.png")
        np.testing.assert_array_equal(mask(tmp_path / "out" / f"{seed}.png"), expected)
    hashes = [member.checkpoint.sha256 for member in members(run)]
    assert [entry["sha256"] for entry in manifest(tmp_path / "out")["checkpoint"]["folds"]] == hashes
    before = tree(tmp_path / "out")
    assert main([*arguments, "--device", "cpu"]) == 0
    told = capsys.readouterr().err
    assert "mean of 3 folds" in told
    assert "3 unchanged and kept" in told
    write_checkpoint(run / "fold-2" / "checkpoints" / "best.ckpt", shift=-9.0)  # the last fold was trained again
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "3 predicted" in capsys.readouterr().err
    assert tree(tmp_path / "out") == before


def test_one_fold_alone_is_an_ordinary_run(run, tmp_path):
    save_image(tmp_path / "in" / "a.png")
    assert predict_folder([tmp_path / "in"], run / "fold-1", tmp_path / "out", device="cpu") == 0
    assert manifest(tmp_path / "out")["checkpoint"]["sha256"] == members(run)[1].checkpoint.sha256


def test_missing_folds_are_named(run):
    (run / "fold-1" / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match=r"1 of 3 folds have no checkpoints/best\.ckpt yet: fold-1"):
        visattn.load(run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"background": 0, "polyp": 1}}, r"its labels differ .*: labels: polyp: 1 and 255"),
        ({"labels": {"background": 0, "adenoma": 255}}, "its labels differ"),
        ({"labels": {"background": 0, "polyp": 255, "tool": 9}}, "differ"),
        ({"size": 24}, r"its preprocessing differ .*: size: \[24, 24\] and \[16, 16\]"),
        ({"threshold": 0.4}, r"its postprocessing differ .*: threshold: 0\.4 and 0\.5"),
    ],
)
def test_folds_of_unlike_training_do_not_predict_together(run, options, message):
    write_checkpoint(run / "fold-2" / "checkpoints" / "best.ckpt", **options)
    with pytest.raises(UserError, match=message) as error:
        visattn.load(run)
    assert "fold-2" in str(error.value)
    assert len(str(error.value).splitlines()) <= 6


def test_only_one_fold_can_be_exported(run, tmp_path):
    with pytest.raises(UserError, match=r"a run with 3 folds, not one checkpoint.\nGive the run folder of one fold"):
        export_weights(run, tmp_path / "w.safetensors")
    export_weights(run / "fold-0", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": ["fold-0", "../../elsewhere", "fold-2"]}, "names other runs than fold-0 to fold-2"),
        ({"runs": None}, "names other runs"),
        ({"recipe": "../../demo"}, "no name of a recipe"),
        ({"recipe": ".."}, "no name of a recipe"),
        ({"recipe": 3}, "not written by"),
        ({"folds": 1, "runs": ["fold-0"]}, "not written by"),
        ({"folds": 10**9}, "not written by"),
        ({"folds": "3"}, "not written by"),
        ({"format": 2}, "newer visattn"),
        ({"format": "1"}, "not written by"),
    ],
)
def test_a_damaged_list_of_folds_is_refused(run, change, message):
    content = json.loads((run / "folds.json").read_text())
    (run / "folds.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError, match=message):
        visattn.load(run)
    for text in ("{", "[]", "[" * 100_000):
        (run / "folds.json").write_text(text)
        with pytest.raises(UserError, match=r"folds\.json: (cannot be read|not written)"):
            visattn.load(run)
