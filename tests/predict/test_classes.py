"""Classifiers that predict: a table with the probability of every class."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visattn
import visattn.networks.classifier
from visattn.checkpoint import KEY, checkpoint_metadata
from visattn.class_predictor import ClassPredictor
from visattn.cli import main
from visattn.data.class_preprocessing import ClassPreprocessing
from visattn.errors import UserError
from visattn.predict_classes import predict_classes

NAMES = ("=dark", "grey", "bright")


class Levels(nn.Module):
    """Logits -10 |mean of the first channel in 0..1 - level of the class|."""

    def __init__(self, in_channels=3, classes=3, pretrained=False):
        super().__init__()
        self.levels = nn.Parameter(torch.linspace(0, 1, classes))

    def forward(self, x):
        return -10 * (x[:, :1].flatten(1).mean(1, keepdim=True) - self.levels).abs()


@pytest.fixture(autouse=True)
def levels(monkeypatch):
    monkeypatch.setattr(visattn.networks.classifier, "create_classifier", lambda name, **given: Levels(**given))


def write(path, shift=0.0, multi_label=False, rank=2, channels=3, names=NAMES):
    network = Levels(classes=len(names))
    with torch.no_grad():
        network.levels.add_(shift)
    content = checkpoint_metadata(
        recipe={"seed_everything": 0},
        labels={"classes": list(names), "multi_label": multi_label},
        preprocessing=ClassPreprocessing((8,) * rank, (0.0,) * channels, (1.0,) * channels).to_config(),
        network={"name": "levels", "in_channels": channels, "classes": len(names)},
        data={"description": "phantom", "fingerprint": "00"},
        task="classification",
    )
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, KEY: content}, path)
    return path


def expected(value, shift=0.0, names=NAMES):
    levels = torch.linspace(0, 1, len(names)) + shift
    return (-10 * (value / 255 - levels).abs()).softmax(0).numpy()


def flat(path, value, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (value,) * 3 if mode == "RGB" else value).save(path)
    return path


def table(folder):
    with (folder / "predictions.csv").open(newline="") as handle:
        return {row["case"]: row for row in csv.DictReader(handle)}


def probabilities(row):
    return np.array([float(row[f"p_{name}"]) for name in NAMES])


def arrays(path, rank=2, sides=8, **more):
    rng = np.random.default_rng(0)
    counts = {"train": 3, "val": 2, "test": 40}
    images = {f"{part}_images": rng.integers(0, 256, (n, *[sides] * rank), np.uint8) for part, n in counts.items()}
    np.savez(path, **images, **more)
    return path, images


def test_images_and_folders_become_rows(tmp_path, capsys):
    checkpoint = write(tmp_path / "best.ckpt")
    for name, value in {"a/one.png": 0, "a/b/two.png": 250, "three.jpg": 130}.items():
        flat(tmp_path / "in" / name, value)
    flat(tmp_path / "grey.png", 120, mode="L")
    out = tmp_path / "out"
    assert main(["predict", *map(str, (tmp_path / "in", tmp_path / "grey.png")), "--checkpoint", str(checkpoint),
                 "--output", str(out)]) == 0  # fmt: skip
    rows = table(out)
    assert list(rows) == ["a/b/two", "a/one", "grey", "three"]
    assert [rows[name]["prediction"] for name in rows] == ["bright", "'=dark", "grey", "grey"], "a formula is guarded"
    np.testing.assert_allclose(probabilities(rows["a/b/two"]), expected(250), atol=1e-5)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "predictions.csv"]
    assert "4 predicted\npredictions: " in capsys.readouterr().err


def test_a_bad_image_fails_alone_and_is_done_when_it_is_repaired(tmp_path, capsys):
    checkpoint = write(tmp_path / "best.ckpt")
    flat(tmp_path / "in" / "a.png", 10)
    flat(tmp_path / "in" / "b.png", 250)
    whole = (tmp_path / "in" / "b.png").read_bytes()
    (tmp_path / "in" / "b.png").write_bytes(whole[:-30])
    out = tmp_path / "out"
    assert predict_classes([tmp_path / "in"], checkpoint, out) == 1
    text = capsys.readouterr().err
    assert "b.png" in text
    assert "1 predicted, 1 failed" in text
    assert list(table(out)) == ["a"]
    states = [(case["case"], case["state"]) for case in json.loads((out / "manifest.json").read_text())["cases"]]
    assert states == [("a", "done"), ("b", "failed")]
    (tmp_path / "in" / "b.png").write_bytes(whole)
    assert predict_classes([tmp_path / "in"], checkpoint, out) == 0
    assert "1 predicted, 1 unchanged and kept" in capsys.readouterr().err
    assert list(table(out)) == ["a", "b"]
    assert predict_classes([tmp_path / "in"], write(tmp_path / "other.ckpt", shift=0.1), out) == 0
    assert "2 predicted" in capsys.readouterr().err, "other weights: all cases again"
    flat(tmp_path / "in" / "a.png", 240)
    assert predict_classes([tmp_path / "in"], tmp_path / "other.ckpt", out) == 0
    assert table(out)["a"]["prediction"] == "bright", "a changed image is predicted again"


def test_what_somebody_else_wrote_is_kept(tmp_path):
    checkpoint, out = write(tmp_path / "best.ckpt"), tmp_path / "out"
    image = flat(tmp_path / "a.png", 10)
    out.mkdir()
    (out / "predictions.csv").write_text("mine\n")
    with pytest.raises(UserError, match="did not write"):
        predict_classes([image], checkpoint, out)
    assert (out / "predictions.csv").read_text() == "mine\n"
    assert predict_classes([image], checkpoint, out, overwrite=True) == 0
    assert list(table(out)) == ["a"]
    with pytest.raises(UserError, match="both be the case 'a'"):
        predict_classes([image, flat(tmp_path / "a.jpg", 20)], checkpoint, out)


def test_an_npz_file_by_part_and_index(tmp_path):
    checkpoint, (path, images) = write(tmp_path / "best.ckpt"), arrays(tmp_path / "x.npz")
    out = tmp_path / "out"
    assert predict_classes([path], checkpoint, out) == 0
    rows = table(out)
    assert len(rows) == 45
    for part, index in (("train", 2), ("test", 0), ("test", 39)):
        value = images[f"{part}_images"][index].mean(dtype=np.float64)
        np.testing.assert_allclose(probabilities(rows[f"{part}_{index:05d}"]), expected(value), atol=1e-5)
    assert predict_classes([path], checkpoint, tmp_path / "some", split="val") == 0
    assert list(table(tmp_path / "some")) == ["val_00000", "val_00001"]
    with pytest.raises(UserError, match="--split: names a part"):
        predict_classes([flat(tmp_path / "a.png", 10)], checkpoint, tmp_path / "none", split="val")


def test_a_bad_npz_file_fails_and_the_others_go_on(tmp_path, capsys):
    checkpoint = write(tmp_path / "best.ckpt")
    path, _ = arrays(tmp_path / "x.npz", sides=32)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert predict_classes([path, flat(tmp_path / "a.png", 0)], checkpoint, tmp_path / "out") == 1
    assert list(table(tmp_path / "out")) == ["a"]
    assert "1 predicted, 1 failed" in capsys.readouterr().err
    np.savez(tmp_path / "pickled.npz", test_images=np.array([{}], object))
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"damage" + whole[middle + 6 :])  # in the data: only the checksum tells
    assert predict_classes([path, tmp_path / "pickled.npz"], checkpoint, tmp_path / "two") == 1
    errors = {case["error"] for case in json.loads((tmp_path / "two" / "manifest.json").read_text())["cases"]}
    assert len(errors) == 3, "no error, and one for each file"
    assert any("could execute code: refused" in text for text in errors)
    assert any("test_images is damaged" in text for text in errors)
    assert {row["case"][:3] for row in table(tmp_path / "two").values()} <= {"tra", "val"}


def test_volumes_come_from_arrays_alone(tmp_path, capsys):
    checkpoint = write(tmp_path / "best.ckpt", rank=3, channels=1)
    path, images = arrays(tmp_path / "x.npz", rank=3)
    assert predict_classes([path], checkpoint, tmp_path / "out", split="test") == 0
    value = images["test_images"][7].mean(dtype=np.float64)
    np.testing.assert_allclose(probabilities(table(tmp_path / "out")["test_00007"]), expected(value), atol=1e-5)
    with pytest.raises(UserError, match="no agreed scale"):
        predict_classes([tmp_path / "a.nii.gz"], checkpoint, tmp_path / "out")
    assert predict_classes([arrays(tmp_path / "flat.npz")[0]], checkpoint, tmp_path / "flat") == 1
    assert "not volumes of uint8" in capsys.readouterr().err
    predictor = visattn.load(checkpoint)
    np.testing.assert_allclose(predictor.predict_proba(images["test_images"][7]), expected(value), atol=1e-5)


def test_folds_give_the_mean_of_their_probabilities(tmp_path):
    members = [visattn.checkpoint.read_checkpoint(write(tmp_path / f"{s}.ckpt", s)) for s in (0.0, 0.3)]
    image = flat(tmp_path / "a.png", 200)
    assert predict_classes([image], tmp_path, tmp_path / "out", members=members) == 0
    wanted = (expected(200) + expected(200, 0.3)) / 2
    np.testing.assert_allclose(probabilities(table(tmp_path / "out")["a"]), wanted, atol=1e-5)
    np.testing.assert_allclose(ClassPredictor(members).predict_proba(image), wanted, atol=1e-6)


def test_several_labels_and_python(tmp_path):
    predictor = visattn.load(write(tmp_path / "best.ckpt", multi_label=True))
    image = flat(tmp_path / "a.png", 0)
    assert predictor.predict(image) == (), "no logit is above 0"
    assert predict_classes([image], tmp_path / "best.ckpt", tmp_path / "out") == 0
    assert table(tmp_path / "out")["a"]["prediction"] == ""
    single = visattn.load(write(tmp_path / "one.ckpt"))
    array = np.full((9, 7, 3), 255, np.uint8)
    assert single.predict(array) == single.predict(Image.fromarray(array)) == single.predict(array[..., 0]) == "bright"
    with pytest.raises(UserError, match=r"takes arrays of uint8 \(H, W\)"):
        single.predict(array.astype(np.float32))


class Corner(nn.Module):
    """Logits that depend on the first pixel or voxel alone, so that no two mirror images have the same."""

    def __init__(self, in_channels=3, classes=3, pretrained=False):
        super().__init__()
        self.levels = nn.Parameter(torch.linspace(0, 1, classes))

    def forward(self, x):
        return -10 * (x.flatten(1)[:, :1] - self.levels).abs()


@pytest.mark.parametrize("rank", [2, 3])
def test_mirror_images_are_averaged(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(visattn.networks.classifier, "create_classifier", lambda name, **given: Corner(**given))
    checkpoint = write(tmp_path / "best.ckpt", rank=rank, channels=1)
    path, images = arrays(tmp_path / "some.npz", rank=rank)
    out = tmp_path / "out"
    command = ["predict", str(path), "--checkpoint", str(checkpoint), "--output", str(out), "--split", "val"]
    assert main(command) == 0
    plain = probabilities(table(out)["val_00001"])
    assert main([*command, "--tta", "flips"]) == 0, "a finished table is made anew when the setting changes"
    image = images["val_images"][1]
    corners = [image[place] for place in itertools.product((0, -1), repeat=rank)]
    every = [(-10 * (float(value) / 255 - torch.linspace(0, 1, 3)).abs()).softmax(0).numpy() for value in corners]
    np.testing.assert_allclose(plain, every[0], atol=1e-5)
    np.testing.assert_allclose(probabilities(table(out)["val_00001"]), np.mean(every, axis=0), atol=1e-5)
    predictor = visattn.load(checkpoint, device="cpu")
    np.testing.assert_allclose(predictor.predict_proba(image, tta="flips"), np.mean(every, axis=0), atol=1e-5)
    with pytest.raises(UserError, match="unknown tta"):
        predictor.predict_proba(image, tta="turns")


def test_options_for_masks_are_refused(tmp_path, capsys):
    checkpoint, image = write(tmp_path / "best.ckpt"), flat(tmp_path / "a.png", 0)
    for option in (["--overlays"], ["--probabilities"], ["--threshold", "0.4"], ["--bids"]):
        command = ["predict", str(image), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *option]
        assert main(command) == 2
        assert f"{option[0]}: is for masks" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
