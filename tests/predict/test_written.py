import numpy as np
import pytest
import torch
from PIL import Image
from predict_fakes import SIZE, Bright, manifest, mask, rows, save_image, tree, write_checkpoint

import visattn
import visattn.networks
from visattn import predict as module
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.predict import measure, predict_folder
from visattn.predictor import load


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
