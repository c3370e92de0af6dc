"""Networks for images on volumes: slice by slice, if their recipe names the axis, as they take a PNG of the slice."""

import nibabel
import numpy as np
import predict_fakes
import pytest
import torch
from PIL import Image

import visattn
from visattn.checkpoint import KEY
from visattn.cli import main
from visattn.data.image_mask_folder import ImageMaskFolder
from visattn.data.slices import Slices
from visattn.errors import UserError
from visattn.inference3d import plan_windows, stream_logits
from visattn.members import read_members
from visattn.volume_predictor import VolumePredictor

# Axes along L, S, A: none is where a picture has it.
AFFINE = np.array([[-0.9, 0, 0, 10], [0, 0, 1.1, -20], [0, 2.0, 0, 5], [0, 0, 0, 1]])
RAS = {"axial": 2, "coronal": 1, "sagittal": 0}


def checkpoint_for(path, slices, **options):
    predict_fakes.write_checkpoint(path, **options)
    content = torch.load(path, weights_only=True)
    if slices is not None:
        content[KEY]["preprocessing"]["slices"] = Slices.from_config(slices).to_config()
    torch.save(content, path)
    return path


def scan(path, shape=(21, 12, 17)):
    coarse = np.random.default_rng(0).random([-(-n // 4) for n in shape])
    array = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)[: shape[0], : shape[1], : shape[2]] * 300 - 50
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), AFFINE), path)
    return array.astype(np.float32)


def pictures(array, axis):
    """Slices (n, rows, columns) as a radiologist sees them, of an array whose axes run L, S, A."""
    ras = array.transpose(0, 2, 1)[::-1]  # R, A, S
    if axis == "axial":
        return ras.transpose(2, 1, 0)[:, ::-1, ::-1]  # rows from A to P, columns from R to L
    if axis == "coronal":
        return ras.transpose(1, 2, 0)[:, ::-1, ::-1]  # rows from S to I
    return ras.transpose(0, 2, 1)[:, ::-1, ::-1]  # rows from S to I, columns from A to P


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
@pytest.mark.parametrize("labels", [None, {"background": 0, "a": 7, "b": 9}])
def test_each_slice_is_predicted_as_a_png_of_it(tmp_path, axis, labels):
    array = scan(tmp_path / "scan.nii.gz")
    checkpoint = checkpoint_for(tmp_path / "c.ckpt", {"axis": axis, "window": [0, 200]}, labels=labels)
    assert main(["predict", str(tmp_path / "scan.nii.gz"), "--checkpoint", str(checkpoint), "--output",
                 str(tmp_path / "out"), "--device", "cpu"]) == 0  # fmt: skip
    mask = nibabel.load(tmp_path / "out" / "scan_mask.nii.gz")
    assert np.allclose(mask.affine, AFFINE)
    images = visattn.load(checkpoint, "cpu")
    masks = pictures(np.asanyarray(mask.dataobj), axis)
    values = pictures(array, axis)
    assert len(masks) == {"axial": 12, "coronal": 17, "sagittal": 21}[axis]
    seen = set()
    for number, (own, picture) in enumerate(zip(masks, values, strict=True)):
        grey = np.round(np.clip(picture / 200, 0, 1) * 255).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / f"{number}.png")
        expected = images.predict(tmp_path / f"{number}.png")
        assert (own == expected).mean() > 0.999, number  # a value half-way may be rounded to either side
        seen |= set(np.unique(expected).tolist())
    assert len(seen) == (2 if labels is None else 3)


def test_without_a_window_the_volume_s_own_percentiles_count(tmp_path):
    array = scan(tmp_path / "scan.nii.gz")
    predictor = VolumePredictor(read_members(checkpoint_for(tmp_path / "c.ckpt", "axial")), "cpu")
    low, high = np.percentile(array, (0.5, 99.5))
    brighter = tmp_path / "brighter.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array * 3 + 7, AFFINE), brighter)
    mask = predictor.predict(tmp_path / "scan.nii.gz")
    assert (mask == predictor.predict(brighter)).mean() > 0.999
    assert (mask[array > low + 0.9 * (high - low)] == 255).mean() > 0.6


@pytest.mark.parametrize("given", ["scan.nii.gz", "folder"])
def test_a_recipe_that_names_no_axis_is_refused(tmp_path, capsys, given):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "scan.nii.gz", tmp_path / "folder" / "a.nii.gz"):
        scan(path)
    checkpoint = checkpoint_for(tmp_path / "c.ckpt", None)
    assert (
        main(["predict", str(tmp_path / given), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "o")]) == 2
    )
    error = capsys.readouterr().err
    assert "names no axis" in error
    assert "data.slices: axial" in error
    assert len(error.splitlines()) <= 6
    assert not list((tmp_path / "o").glob("*.nii.gz"))


def test_images_beside_volumes_are_images_and_both_are_not_mixed(tmp_path, capsys):
    (tmp_path / "both").mkdir()
    scan(tmp_path / "both" / "a.nii.gz")
    predict_fakes.save_image(tmp_path / "both" / "a.png")
    checkpoint = str(checkpoint_for(tmp_path / "c.ckpt", "axial"))
    output = ["--output", str(tmp_path / "o"), "--device", "cpu"]
    assert main(["predict", str(tmp_path / "both"), "--checkpoint", checkpoint, *output]) == 0
    assert (tmp_path / "o" / "predictions.csv").is_file()
    inputs = [str(tmp_path / "both" / name) for name in ("a.nii.gz", "a.png")]
    assert main(["predict", *inputs, "--checkpoint", checkpoint, *output]) == 2
    assert "some inputs are images, others volumes" in capsys.readouterr().err


def test_the_recipe_says_it_to_the_checkpoint():
    data = ImageMaskFolder("phantom", {"background": 0, "polyp": 255}, slices={"axis": "coronal", "window": [-20, 120]})
    config = data.preprocessing.to_config()
    assert config["slices"] == {"axis": "coronal", "window": [-20.0, 120.0]}
    assert type(data.preprocessing).from_config(config) == data.preprocessing
    assert "slices" not in ImageMaskFolder("phantom", {"background": 0, "polyp": 255}).preprocessing.to_config()


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ("axil", "Did you mean 'axial'"),
        ({"axes": "axial"}, "needs a name"),
        ({"axis": "axial", "windw": [0, 1]}, "Did you mean 'window'"),
        ({"axis": "axial", "window": [1, 0]}, "two rising values"),
        ({"axis": "axial", "window": [0]}, "black and white"),
        ({"axis": "axial", "window": [0, float("nan")]}, "black and white"),
        (3, "needs a name"),
    ],
)
def test_mistakes(slices, message):
    with pytest.raises(UserError, match=message):
        Slices.from_config(slices)


@pytest.mark.parametrize("patch", [(1, 5, 6), (4, 5, 3), (2, 2, 6)])
def test_windows_that_only_touch_do_not_add_up(patch):
    volume = torch.from_numpy(np.random.default_rng(0).random((1, 8, 5, 6)).astype(np.float32))
    result = torch.full_like(volume, np.nan)
    grid = plan_windows(volume.shape[1:], patch, 0.0)
    for first, sums, weights in stream_logits(lambda windows: windows * 3, volume, grid, batch=2):
        result[:, first : first + sums.shape[1]] = sums / weights
    assert torch.allclose(result, volume * 3)
