import csv
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visattn
import visattn.networks
from visattn import predict as module
from visattn.checkpoint import KEY, checkpoint_metadata
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.predict import measure, predict_folder
from visattn.predict_plan import Case, find_images, fitted_name, output_folder, plan_cases, shown
from visattn.predict_record import cell
from visattn.predictor import Predictor, load

SIZE = 16


class Bright(nn.Module):
    """Logits that can be worked out by hand: class k of K from the red channel r in 0..1.

    One class: 20 (r - 0.5). Several: -40 |r - k / (K - 1)|.
    """

    def __init__(self, in_channels=3, classes=1, pretrained=False):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 1, classes))

    def forward(self, x):
        red = x[:, :1]
        if len(self.weight) == 1:
            return (red - 0.5) * 20 + self.weight, red  # a second output, as side maps
        return -40 * (red - self.weight.view(1, -1, 1, 1)).abs()


def create_model(name, **kwargs):
    return Bright(**kwargs)


@pytest.fixture(autouse=True)
def bright_network(monkeypatch):
    monkeypatch.setattr(visattn.networks, "create_model", create_model, raising=False)


def write_checkpoint(path, labels=None, shift=0.0, threshold=0.5, **blocks):
    label_map = Labels.from_config(labels or {"background": 0, "polyp": 255}, **blocks)
    network = Bright(classes=label_map.channels)
    with torch.no_grad():
        if label_map.channels == 1:
            network.weight.fill_(shift)
    content = checkpoint_metadata(
        recipe={"seed_everything": 0},
        labels=label_map.to_config(),
        preprocessing={"size": [SIZE, SIZE], "mean": [0.0] * 3, "std": [1.0] * 3, "channels": 3},
        network={"name": "bright", "in_channels": 3, "classes": label_map.channels},
        data={"description": "phantom (embedded, synthetic)", "fingerprint": "00"},
        threshold=threshold,
    )
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, KEY: content}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "best.ckpt")


def save_image(path, array=None, seed=0, size=(SIZE, SIZE), **options):
    if array is None:
        array = blocks(seed, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.stack([array, np.zeros_like(array), np.zeros_like(array)], axis=-1)
    Image.fromarray(rgb).save(path, **options)
    return array


def blocks(seed, size=(SIZE, SIZE)):
    """0 or 255 in 4 x 4 blocks."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (-(-size[0] // 4), -(-size[1] // 4)))
    return (coarse.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]] * 255).astype(np.uint8)


def mask(path):
    with Image.open(path) as image:
        return np.asarray(image)


def rows(output):
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def manifest(output):
    return json.loads((output / "manifest.json").read_text())


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# --- what is written -------------------------------------------------------------------------------------------------


def test_masks_mirror_the_input_folders(tmp_path, checkpoint):
    one = save_image(tmp_path / "in" / "a.png", seed=1)
    two = save_image(tmp_path / "in" / "site 2" / "x.y.jpg", seed=2, quality=100)
    save_image(tmp_path / "in" / ".hidden" / "h.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    out = tmp_path / "deep" / "out"
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 0
    assert tree(out) == ["a.png", "manifest.json", "predictions.csv", "site 2/x.y.png"]
    np.testing.assert_array_equal(mask(out / "a.png"), one)
    np.testing.assert_array_equal(mask(out / "site 2" / "x.y.png"), two)
    assert mask(out / "a.png").dtype == np.uint8


def test_mask_has_the_images_own_size(tmp_path, checkpoint):
    array = save_image(tmp_path / "a.png", np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((30, 45), np.uint8)))
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out")
    result = mask(tmp_path / "out" / "a.png")
    assert result.shape == array.shape == (60, 90)
    assert (result != array).mean() < 0.05  # the border between blocks is blurred at 16 x 16


def test_exif_orientation_is_honoured(tmp_path, checkpoint):
    array = np.zeros((8, 16), np.uint8)
    array[:4, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(tmp_path / "a.png", array, exif=exif)
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out")
    result = mask(tmp_path / "out" / "a.png")
    assert result.shape == (16, 8)
    assert result[2, 6] == 255
    assert result[2, 2] == 0


def test_table_of_predictions(tmp_path, checkpoint):
    array = np.zeros((SIZE, SIZE), np.uint8)
    array[1, 1] = array[2, 2] = array[2, 8] = 255  # two of them touch at a corner: 8-connected
    save_image(tmp_path / "in" / "a.png", array)
    save_image(tmp_path / "in" / "b.png", np.zeros((SIZE, SIZE), np.uint8))
    predict_folder([tmp_path / "in"], checkpoint, tmp_path / "out")
    first, second = rows(tmp_path / "out")
    assert {key: first[key] for key in ("case", "class", "pixels", "components", "width", "height", "mask")} == {
        "case": "a", "class": "polyp", "pixels": "3", "components": "2", "width": "16", "height": "16", "mask": "a.png",
    }  # fmt: skip
    assert float(first["percent_of_image"]) == pytest.approx(100 * 3 / 256, abs=1e-4)
    assert float(first["mean_foreground_probability"]) == pytest.approx(1 / (1 + np.exp(-10)), abs=1e-4)
    assert 0 < float(first["seconds"]) < 10
    assert (second["pixels"], second["components"], second["mean_foreground_probability"]) == ("0", "0", "")


def test_manifest_says_what_made_the_masks(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", threshold=0.25, tta="flips", device="cpu")
    content = manifest(tmp_path / "out")
    assert content["notice"] == visattn.NOTICE
    assert content["device"] == "cpu"
    assert content["checkpoint"]["sha256"] == load(checkpoint).checkpoint.sha256
    assert content["versions"]["torch"]
    assert content["training_data"]["description"] == "phantom (embedded, synthetic)"
    settings = content["settings"][content["current_settings"]]
    assert (settings["threshold"], settings["tta"]) == (0.25, "flips")
    assert content["cases"][0]["state"] == "done"


def test_threshold_is_on_the_plain_sigmoid(tmp_path, checkpoint):
    save_image(tmp_path / "a.png", np.full((SIZE, SIZE), 120, np.uint8))  # sigmoid(20 (120/255 - 0.5)) = 0.357
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "low", threshold=0.35)
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "high", threshold=0.36)
    assert (mask(tmp_path / "low" / "a.png") == 255).all()
    assert (mask(tmp_path / "high" / "a.png") == 0).all(), "min-max scaling of the map would make this foreground"


def test_classes_take_the_largest_probability(tmp_path):
    labels = {"background": 7, "rim": [40, 41], "c/o:re": 1000}
    checkpoint = write_checkpoint(tmp_path / "c.ckpt", labels)
    array = np.array([0, 60, 70, 180, 200, 255], np.uint8).repeat(SIZE).reshape(6, SIZE)
    save_image(tmp_path / "a.png", array.repeat(SIZE, 0))
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", probabilities=True, overlays=True)
    result = mask(tmp_path / "out" / "a.png")
    assert result.dtype == np.uint16, "values above 255 need 16 bits"
    assert result[8::SIZE, 0].tolist() == [7, 7, 40, 40, 1000, 1000]
    assert tree(tmp_path / "out") == [
        "a.png", "manifest.json", "overlays/a.png", "predictions.csv", "probabilities/a_background_prob.png",
        "probabilities/a_c_o_re_prob.png", "probabilities/a_rim_prob.png",
    ]  # fmt: skip
    parts = [mask(p) for p in sorted((tmp_path / "out" / "probabilities").iterdir())]
    assert {part.dtype for part in parts} == {np.dtype(np.uint16)}
    total = np.sum(parts, axis=0, dtype=np.int64)
    assert np.abs(total - 65535).max() <= 2
    counted = [("rim", str((result == 40).sum())), ("c/o:re", str((result == 1000).sum()))]
    assert [(r["class"], r["pixels"]) for r in rows(tmp_path / "out")] == counted
    with pytest.raises(UserError, match="largest probability wins"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out2", threshold=0.4)


def test_regions_are_painted(tmp_path):
    labels = {"background": 0, "rim": 1, "core": 2}
    checkpoint = write_checkpoint(tmp_path / "r.ckpt", labels, regions={"whole": ["rim", "core"], "core": ["core"]})
    save_image(tmp_path / "a.png", np.full((SIZE, SIZE), 255, np.uint8))
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", probabilities=True, threshold=0.4)
    assert (mask(tmp_path / "out" / "a.png") == 2).all(), "logit of the inner region is 0 at r = 1: foreground"
    assert [r["class"] for r in rows(tmp_path / "out")] == ["whole", "core"]
    assert len(list((tmp_path / "out" / "probabilities").iterdir())) == 2


def test_probability_image(tmp_path, checkpoint):
    save_image(tmp_path / "a.png", np.full((SIZE, SIZE), 120, np.uint8))
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", probabilities=True)
    value = mask(tmp_path / "out" / "probabilities" / "a_prob.png")
    assert np.unique(value).tolist() == [round(65535 / (1 + np.exp(-20 * (120 / 255 - 0.5))))]


def test_measure_regions_overlap():
    labels = Labels.from_config({"bg": 0, "rim": 1, "core": 2}, {"whole": ["rim", "core"], "core": ["core"]})
    indices = np.array([[0, 1, 2, 2]], np.uint8)
    probability = np.array([[[0.1, 0.6, 0.8, 1.0]], [[0.0, 0.1, 0.7, 0.9]]], np.float32)
    whole, core = measure(indices, probability, labels)
    assert (whole["class"], whole["pixels"], whole["mean_foreground_probability"]) == ("whole", 3, 0.8)
    assert (core["class"], core["pixels"], core["mean_foreground_probability"]) == ("core", 2, 0.8)
    three = Labels.from_config({"bg": 0, "rim": 1, "core": 2})
    probability = np.array([[[0.9, 0.1, 0.0]], [[0.1, 0.7, 0.2]], [[0.0, 0.2, 0.8]]], np.float32)
    rim, core = measure(np.array([[0, 1, 2]], np.uint8), probability, three)
    assert (rim["mean_foreground_probability"], core["mean_foreground_probability"]) == (0.7, 0.8)


def test_the_same_pixels_from_python(tmp_path, checkpoint):
    array = save_image(tmp_path / "a.png", seed=5, size=(40, 24))
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out")
    predictor = visattn.load(checkpoint)
    expected = mask(tmp_path / "out" / "a.png")
    image = Image.open(tmp_path / "a.png")
    for given in (tmp_path / "a.png", str(tmp_path / "a.png"), image, np.asarray(image)):
        np.testing.assert_array_equal(predictor.predict(given), expected)
    assert predictor.predict_proba(image).shape == (1, 40, 24)
    grey = predictor.predict(array)
    assert grey.shape == (40, 24)
    assert predictor.recipe == {"seed_everything": 0}
    for bad in (array.astype(np.float32), np.zeros((2, 2, 4), np.uint8), np.zeros((0, 3, 3), np.uint8)):
        with pytest.raises(UserError, match="must be uint8"):
            predictor.predict(bad)
    with pytest.raises(UserError, match="more than 8 bits"):
        predictor.predict(Image.new("I;16", (3, 3)))


def test_batches_do_not_change_results(tmp_path, checkpoint, monkeypatch):
    for index in range(7):
        save_image(tmp_path / "in" / f"{index}.png", seed=index, size=(16 + index, 20))
    sizes = []
    forward = Bright.forward
    monkeypatch.setattr(Bright, "forward", lambda self, x: sizes.append(len(x)) or forward(self, x))
    predict_folder([tmp_path / "in"], checkpoint, tmp_path / "one")
    assert sizes == [1] * 7
    monkeypatch.setitem(module.BATCH, "cpu", 4)
    predict_folder([tmp_path / "in"], checkpoint, tmp_path / "four")
    assert sizes[7:] == [4, 4], "the last batch is filled up"
    for index in range(7):
        assert (tmp_path / "one" / f"{index}.png").read_bytes() == (tmp_path / "four" / f"{index}.png").read_bytes()


def test_too_little_device_memory_halves_the_batch(tmp_path, checkpoint, monkeypatch, capsys):
    arrays = [save_image(tmp_path / "in" / f"{index}.png", seed=index) for index in range(6)]
    forward = Bright.forward
    limit = 2

    def small(self, x):
        if len(x) > limit:
            raise torch.OutOfMemoryError
        return forward(self, x)

    monkeypatch.setattr(Bright, "forward", small)
    monkeypatch.setitem(module.BATCH, "cpu", 8)
    assert predict_folder([tmp_path / "in"], checkpoint, tmp_path / "out") == 0
    for index, array in enumerate(arrays):
        np.testing.assert_array_equal(mask(tmp_path / "out" / f"{index}.png"), array)
    limit = 0
    assert predict_folder([tmp_path / "in"], checkpoint, tmp_path / "out2") == 1
    assert "memory does not suffice" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_bad_image_fails_alone(tmp_path, checkpoint, capsys):
    good = save_image(tmp_path / "in" / "b.png", seed=3)
    save_image(tmp_path / "in" / "c.jpg", size=(64, 64))
    data = (tmp_path / "in" / "c.jpg").read_bytes()
    (tmp_path / "in" / "c.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "in" / "a.png").write_bytes(b"")
    out = tmp_path / "out"
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 1
    assert tree(out) == ["b.png", "manifest.json", "predictions.csv"]
    np.testing.assert_array_equal(mask(out / "b.png"), good)
    text = capsys.readouterr().err
    assert "a.png" in text
    assert "c.jpg" in text
    assert "1 predicted, 2 failed" in text
    assert str(out) in text.splitlines()[-1]
    assert [c["state"] for c in manifest(out)["cases"]] == ["failed", "done", "failed"]
    assert [r["case"] for r in rows(out)] == ["b"]

    (tmp_path / "in" / "c.jpg").write_bytes(data)  # repaired: only this one is done
    (tmp_path / "in" / "a.png").unlink()
    before = (out / "b.png").stat().st_mtime_ns
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 0
    assert (out / "b.png").stat().st_mtime_ns == before
    assert [c["state"] for c in manifest(out)["cases"]] == ["done", "done"]


def test_an_older_mask_does_not_pass_for_a_failed_case(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", probabilities=True)
    (tmp_path / "a.png").write_bytes(b"broken")
    assert predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out") == 1
    assert tree(tmp_path / "out") == ["manifest.json", "predictions.csv"]
    assert rows(tmp_path / "out") == []


def test_inputs_that_are_not_there(tmp_path, checkpoint):
    save_image(tmp_path / "image.png")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"imagee\.png: no such file or folder\.\nDid you mean .*image\.png"):
        predict_folder([tmp_path / "imagee.png"], checkpoint, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image in this folder\.\nImages end in: \.png"):
        predict_folder([tmp_path / "empty"], checkpoint, out)
    with pytest.raises(UserError, match="no such checkpoint"):
        predict_folder([tmp_path / "image.png"], tmp_path / "x.ckpt", out)
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        predict_folder([tmp_path / "image.png"], checkpoint, out, device="cudda")
    with pytest.raises(UserError, match="between 0 and 1"):
        predict_folder([tmp_path / "image.png"], checkpoint, out, threshold=50)
    with pytest.raises(UserError, match="unknown tta"):
        predict_folder([tmp_path / "image.png"], checkpoint, out, tta="all")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="not on this machine"):
            predict_folder([tmp_path / "image.png"], checkpoint, out, device="cuda")
    assert not out.exists(), "a mistake leaves no folder behind"


def test_two_inputs_with_one_mask(tmp_path, checkpoint):
    save_image(tmp_path / "in" / "a.jpg")
    save_image(tmp_path / "in" / "a.png")
    with pytest.raises(UserError) as error:
        predict_folder([tmp_path / "in"], checkpoint, tmp_path / "out")
    message = str(error.value)
    assert all(str(tmp_path / name) in message for name in ("out/a.png", "in/a.jpg", "in/a.png"))
    assert len(message.splitlines()) <= 6
    assert not (tmp_path / "out").exists()
    save_image(tmp_path / "one" / "b.png")
    save_image(tmp_path / "two" / "b.png")
    with pytest.raises(UserError, match="same file"):
        predict_folder([tmp_path / "one", tmp_path / "two"], checkpoint, tmp_path / "out")
    # the advice works
    (tmp_path / "both").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).rename(tmp_path / "both" / name)
    assert predict_folder([tmp_path / "both"], checkpoint, tmp_path / "out") == 0
    assert (tmp_path / "out" / "two" / "b.png").exists()


def plan(names, labels=None, probabilities=False, overlays=False, case_sensitive=True, output=Path("/out")):
    from pathlib import PurePosixPath

    images = [(Path("/in") / name, PurePosixPath(name)) for name in names]
    labels = labels or Labels.from_config({"background": 0, "polyp": 1})
    return plan_cases(images, output, labels, probabilities, overlays, case_sensitive)


def test_less_obvious_collisions():
    with pytest.raises(UserError, match="same file"):
        plan(["overlays/a.png", "a.png"], overlays=True)
    with pytest.raises(UserError, match="same file"):
        plan(["probabilities/a_prob.png", "a.png"], probabilities=True)
    with pytest.raises(UserError, match="same file"):
        plan(["a.jpg", "a.png/b.jpg"])  # a mask and a folder of one name
    plan(["A.png", "a.jpg", "e\u0301.png", "\u00e9.png"])
    for pair in (["A.png", "a.jpg"], ["e\u0301.png", "\u00e9.png"]):
        with pytest.raises(UserError, match="same file"):
            plan(pair, case_sensitive=False)
    labels = Labels.from_config({"bg": 0, "a/b": 1, "a:b": 2, "A b": 3, "../..": 4})
    (case,) = plan(["x.png"], labels, probabilities=True)
    assert len({name.casefold() for name in case.probabilities}) == 5
    assert {Path(name).parent for name in case.probabilities} == {Path("probabilities")}


def test_an_input_is_never_overwritten(tmp_path, checkpoint):
    save_image(tmp_path / "in" / "a.png")
    before = (tmp_path / "in" / "a.png").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is an input folder too"):
            predict_folder([tmp_path / "in"], checkpoint, tmp_path / "in", overwrite=overwrite)
        with pytest.raises(UserError, match="is an input image and would be overwritten"):
            predict_folder([tmp_path / "in" / "a.png"], checkpoint, tmp_path / "in", overwrite=overwrite)
        (tmp_path / "link").symlink_to(tmp_path / "in") if not overwrite else None
        with pytest.raises(UserError, match="would be overwritten"):
            predict_folder([tmp_path / "in" / "a.png"], checkpoint, tmp_path / "link", overwrite=overwrite)
    assert (tmp_path / "in" / "a.png").read_bytes() == before
    assert tree(tmp_path / "in") == ["a.png"]


def test_output_inside_the_input_is_not_read_again(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    out = tmp_path / "masks"
    for _ in range(2):
        assert predict_folder([tmp_path], checkpoint, out) == 0
        assert tree(out) == ["a.png", "manifest.json", "predictions.csv"]


def test_linked_folders_are_searched_once(tmp_path):
    save_image(tmp_path / "elsewhere" / "b.png")
    save_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    found = find_images([tmp_path / "in", tmp_path / "in" / "a.png"], tmp_path / "out")
    assert [str(relative) for _, relative in found] == ["a.png", "linked/b.png"]


# --- the output folder -----------------------------------------------------------------------------------------------


def test_files_of_others_are_not_overwritten(tmp_path, checkpoint):
    array = save_image(tmp_path / "in" / "a.png", seed=1)
    out = tmp_path / "truth"
    out.mkdir()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(out / "a.png")
    before = (out / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"not written by visattn predict(.|\n)*truth/a\.png(.|\n)*--overwrite"):
        predict_folder([tmp_path / "in"], checkpoint, out)
    assert tree(out) == ["a.png"]
    assert (out / "a.png").read_bytes() == before
    assert predict_folder([tmp_path / "in"], checkpoint, out, overwrite=True) == 0
    np.testing.assert_array_equal(mask(out / "a.png"), array)

    Image.fromarray(array[::-1]).save(out / "a.png")  # corrected by hand
    by_hand = (out / "a.png").read_bytes()
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 0, "unchanged input: left alone"
    with pytest.raises(UserError, match="changed since"):
        predict_folder([tmp_path / "in"], checkpoint, out, tta="flips")
    assert (out / "a.png").read_bytes() == by_hand
    (out / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        predict_folder([tmp_path / "in"], checkpoint, out)


@pytest.mark.parametrize("change", ["case", "list", "type", "size", "text", "deep"])
def test_a_damaged_manifest_is_told(tmp_path, checkpoint, change):
    save_image(tmp_path / "a.png")
    out = tmp_path / "out"
    predict_folder([tmp_path / "a.png"], checkpoint, out)
    content = manifest(out)
    if change == "case":
        content["cases"][0]["extra"] = 1
    elif change == "list":
        content["cases"] = 3
    elif change == "type":
        content["cases"][0]["files"] = "a.png"
    elif change == "size":
        content["cases"][0]["size"] = [1]
    text = {"text": "{", "deep": "[" * 100_000}.get(change) or json.dumps(content)
    (out / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest"):
        predict_folder([tmp_path / "a.png"], checkpoint, out)
    assert predict_folder([tmp_path / "a.png"], checkpoint, out, overwrite=True) == 0


def test_a_manifest_cannot_point_outside(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    out = tmp_path / "out"
    predict_folder([tmp_path / "a.png"], checkpoint, out)
    victim = tmp_path / "victim.txt"
    victim.write_text("keep")
    content = manifest(out)
    from visattn.predict_record import file_hash

    content["cases"][0]["files"]["../victim.txt"] = file_hash(victim)
    (out / "manifest.json").write_text(json.dumps(content))
    predict_folder([tmp_path / "a.png"], checkpoint, out, tta="flips")
    assert victim.read_text() == "keep"


def test_only_what_changed_is_done_again(tmp_path, checkpoint, monkeypatch):
    done = []
    decode = module._Run._decode
    monkeypatch.setattr(module._Run, "_decode", lambda self, case: done.append(case.name) or decode(self, case))
    out, folder = tmp_path / "out", tmp_path / "in"
    for name in "abc":
        save_image(folder / f"{name}.png", seed=ord(name))

    def run(**options):
        done.clear()
        assert predict_folder([folder], options.pop("checkpoint", checkpoint), out, **options) == 0
        return sorted(done)

    assert run() == ["a", "b", "c"]
    assert run() == []
    save_image(folder / "b.png", seed=99)
    assert run() == ["b"]
    (out / "c.png").unlink()
    assert run() == ["c"]
    os.utime(folder / "a.png")
    assert run() == [], "times do not count, content does"
    assert run(threshold=0.4) == ["a", "b", "c"]
    assert run() == ["a", "b", "c"], "the masks there are those of the other threshold"
    assert run(overlays=True) == ["a", "b", "c"]
    assert run() == []
    assert run(overwrite=True) == ["a", "b", "c"]
    assert not (out / "overlays" / "a.png").exists(), "an overlay that was not made anew is gone"
    assert run(tta="flips") == ["a", "b", "c"]
    other = write_checkpoint(tmp_path / "other.ckpt", shift=0.5)
    assert run(checkpoint=other) == ["a", "b", "c"]
    assert run(checkpoint=other) == []
    moved = tmp_path / "moved.ckpt"
    other.rename(moved)
    assert run(checkpoint=moved) == [], "weights count, their file's name does not"


def test_masks_of_other_settings_stay_out_of_the_table(tmp_path, checkpoint, capsys):
    for name in "ab":
        save_image(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    predict_folder([tmp_path / "a.png"], checkpoint, out)
    predict_folder([tmp_path / "b.png"], checkpoint, out)
    assert [r["case"] for r in rows(out)] == ["a", "b"], "one folder may be filled by several calls"
    predict_folder([tmp_path / "b.png"], checkpoint, out, threshold=0.3)
    assert [r["case"] for r in rows(out)] == ["b"]
    assert "1 masks of other weights or settings" in capsys.readouterr().err
    (out / "a.png").unlink()
    predict_folder([tmp_path / "b.png"], checkpoint, out, threshold=0.3)
    assert [c["mask"] for c in manifest(out)["cases"]] == ["b.png"]


def test_output_that_cannot_be_written(tmp_path, checkpoint, monkeypatch):
    save_image(tmp_path / "a.png")
    (tmp_path / "file").write_text("")

    def no_network(*args):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(module, "Predictor", no_network)
    with pytest.raises(UserError, match="cannot be written"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot be written"):
        predict_folder([tmp_path / "a.png"], checkpoint, Path("/proc/out"))
    monkeypatch.setattr("visattn.predict_plan.shutil.disk_usage", lambda _: os.statvfs_result and Usage(10))
    with pytest.raises(UserError, match=r"needs about .* MB, but 0 MB are free"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", probabilities=True)
    assert not (tmp_path / "out").exists()


class Usage:
    def __init__(self, free):
        self.free = free


def test_one_run_at_a_time(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    with output_folder(tmp_path / "out"), pytest.raises(UserError, match="another visattn predict"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out")
    assert predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out") == 0


def test_disk_full_keeps_what_is_done(tmp_path, checkpoint, monkeypatch):
    arrays = {name: save_image(tmp_path / "in" / f"{name}.png", seed=ord(name)) for name in "abcdef"}
    out = tmp_path / "out"
    write = module.write_bytes_atomic

    def full(path, data):
        if path.name == "d.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "write_bytes_atomic", full)
    with pytest.raises(UserError, match="No space left on device"):
        predict_folder([tmp_path / "in"], checkpoint, out)
    states = {c["mask"]: c["state"] for c in manifest(out)["cases"]}
    assert states["a.png"] == states["c.png"] == "done"
    assert states["d.png"] == "planned"
    monkeypatch.undo()
    monkeypatch.setattr(visattn.networks, "create_model", create_model, raising=False)
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 0
    for name, array in arrays.items():
        np.testing.assert_array_equal(mask(out / f"{name}.png"), array)
    assert [r["case"] for r in rows(out)] == list("abcdef")


def test_a_case_that_cannot_be_written_fails_alone(tmp_path, checkpoint):
    save_image(tmp_path / "in" / "a.png")
    save_image(tmp_path / "in" / "sub" / "b.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "sub").write_text("a file where a folder should be")
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 1
    assert [r["case"] for r in rows(out)] == ["a"]


def test_interruption_keeps_what_is_done(tmp_path, checkpoint, monkeypatch, capsys):
    for name in "abcdefgh":
        save_image(tmp_path / "in" / f"{name}.png")
    collect = module._Run._collect
    calls = []

    def interrupted(self, limit):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        collect(self, limit)

    monkeypatch.setattr(module._Run, "_collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_folder([tmp_path / "in"], checkpoint, tmp_path / "out")
    assert "same command goes on" in capsys.readouterr().err
    done = [c for c in manifest(tmp_path / "out")["cases"] if c["state"] == "done"]
    assert len(done) >= 1
    for entry in done:
        assert (tmp_path / "out" / entry["mask"]).exists()
    assert not [p for p in (tmp_path / "out").iterdir() if ".part" in p.name or "lock" in p.name]


# --- hostile names ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "=cmd|' calc'!A0.png",
    "-2+3.png",
    "@sum.png",
    "+1.png",
    '<script>alert("1")<script>.png',
    "new\nline.png",
    "tab\there.png",
    "\x1b[31mred.png",
    "[bold]rich[bold].png",
    "名前 — ü.png",
    "\u202egnp.png",
    "quote\"'.png",
    "%s{0}$HOME.png",
    "long" * 62 + ".jpeg",
]


def test_hostile_names(tmp_path, checkpoint, capsys):
    raw = os.fsdecode(b"not-utf8-\xff.png")
    for index, name in enumerate([*HOSTILE, raw]):
        save_image(tmp_path / "in" / "x.png", seed=index)
        (tmp_path / "in" / "x.png").rename(tmp_path / "in" / name)
    (tmp_path / "in" / "\x1b]0;bad\n.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict_folder([tmp_path / "in"], checkpoint, out, overlays=True, probabilities=True) == 1
    for index, name in enumerate(HOSTILE):
        if not name.startswith("long"):
            np.testing.assert_array_equal(mask(out / (name.rsplit(".", 1)[0] + ".png")), blocks(index))
    assert all(len(os.fsencode(p.name)) <= 255 for p in out.rglob("*"))
    text = (out / "predictions.csv").read_bytes().decode("utf-8")
    content = list(csv.DictReader(text.splitlines(keepends=True)))
    assert len(content) == len(HOSTILE) + 1
    for row in content:
        for value in row.values():
            assert not value or value[0] not in "=+-@\t\r"
    assert any(row["case"] == "'=cmd|' calc'!A0" for row in content)
    assert raw in {Path(entry["image"]).name for entry in manifest(out)["cases"]}
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "x1b]0;bad" in told
    assert predict_folder([tmp_path / "in"], checkpoint, out, overlays=True, probabilities=True) == 1
    assert f"{len(HOSTILE) + 1} unchanged" in capsys.readouterr().err


def test_small_helpers():
    assert cell("=1") == "'=1"
    assert cell(-1.5) == "-1.5"
    assert cell(None) == ""
    assert cell("a=1") == "a=1"
    assert shown("a\nb\x1b\u202e\udcff é") == r"a\nb\x1b\u202e\udcff é"
    assert fitted_name("a", ".png") == "a.png"
    one, two = fitted_name("é" * 200 + "1", "_prob.png"), fitted_name("é" * 200 + "2", "_prob.png")
    assert one != two
    assert len(one.encode()) <= 255
    assert Case(Path("a"), "m.png", ("p.png",), "o.png").files == ("p.png", "o.png", "m.png")


def test_a_checkpoint_whose_parts_disagree(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    entry = content[KEY]
    for key, value in [
        ("labels", {"labels": {"background": 0}}),
        ("preprocessing", {"size": [0, 3], "mean": [0.0], "std": [1.0], "channels": 1}),
        ("preprocessing", entry["preprocessing"] | {"std": [0.0] * 3}),
        ("postprocessing", {}),
        ("network", entry["network"] | {"classes": 4}),
        ("network", entry["network"] | {"activation": "softmax"}),
    ]:
        torch.save(content | {KEY: entry | {key: value}}, tmp_path / "bad.ckpt")
        with pytest.raises(UserError, match=r"bad\.ckpt: damaged checkpoint"):
            load(tmp_path / "bad.ckpt")
    torch.save(content | {KEY: entry | {"task": "classification"}}, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match="its task is 'classification'"):
        load(tmp_path / "bad.ckpt")
    assert "Predictor(bright" in repr(Predictor(load(checkpoint).checkpoint))


# --- killed at any moment --------------------------------------------------------------------------------------------

CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_predict, visattn.networks
visattn.networks.create_model = test_predict.create_model
from visattn import predict, predict_record
write, pause = predict.write_bytes_atomic, float(sys.argv[5])
def slow(path, data):
    time.sleep(pause)
    write(path, data)
predict.write_bytes_atomic = slow
predict_record.Record.save_sometimes = lambda self: self.save()
print("ready", flush=True)
sys.exit(predict.predict_folder([Path(sys.argv[2])], sys.argv[3], sys.argv[4], probabilities=True))
"""


def kill_and_resume(tmp_path, checkpoint, delays):
    for index in range(30):
        save_image(tmp_path / "in" / f"{index:02}.png", seed=index, size=(90, 70))
    predict_folder([tmp_path / "in"], checkpoint, tmp_path / "whole", probabilities=True)
    out = tmp_path / "out"
    killed = 0
    for delay in delays:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), tmp_path / "in", checkpoint, out, "0.01"]
        child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        for path in out.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                if path.suffix == ".png":
                    assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(out)).read_bytes()
                elif path.suffix == ".json":
                    for entry in json.loads(path.read_text())["cases"]:
                        assert entry["state"] == "planned" or (out / entry["mask"]).exists()
                else:
                    assert len(path.read_text().splitlines()[0].split(",")) == 11
    assert predict_folder([tmp_path / "in"], checkpoint, out, probabilities=True) == 0
    assert tree(out) == tree(tmp_path / "whole")
    for name in tree(out):
        if name.endswith(".png"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / n)] for n in ("out", "whole")
    ]
    assert timeless[0] == timeless[1]
    return killed


def test_killed_once(tmp_path, checkpoint):
    assert kill_and_resume(tmp_path, checkpoint, [0.25]) == 1


@pytest.mark.slow  # each kill starts a process that imports torch
def test_killed_at_random_moments(tmp_path, checkpoint):
    rng = random.Random(0)
    assert kill_and_resume(tmp_path, checkpoint, [rng.uniform(0, 0.3) for _ in range(12)]) >= 6
