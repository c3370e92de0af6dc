"""Masks of volumes: in the grid of their file, whatever its orientation, and whatever memory there is."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import visattn
import visattn.networks
from visattn.cli import main
from visattn.data.geometry import Geometry
from visattn.errors import UserError
from visattn.predict_volumes import predict_volumes
from visattn.volume_inference import entropy

_spec = importlib.util.spec_from_file_location("volume_stub", Path(__file__).parent / "volume_stub.py")
stub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub)


@pytest.fixture(autouse=True)
def bright_network(monkeypatch):
    """Instead of that of images."""
    monkeypatch.setattr(visattn.networks, "create_model", stub.create_model)


def oblique(code, zooms=(0.7, 1.1, 3.0), degrees=9):
    """An affine whose axes run along the directions of `code`, turned a little."""
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    axes = np.zeros((3, 3))
    for axis, letter in enumerate(code):
        world = next(index for index, pair in enumerate(("LR", "PA", "IS")) if letter in pair)
        axes[world, axis] = 1 if letter in "RAS" else -1
    affine = np.eye(4)
    affine[:3, :3] = rotation @ axes @ np.diag(zooms)
    affine[:3, 3] = (-31.25, 17.5, 4.0)
    return affine


def save(path, array, affine, codes=(1, 2)):
    image = nibabel.Nifti1Image(array.astype(np.float32), affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def blobs(shape, seed=0, levels=2):
    """Values k / (levels - 1) in blocks of three voxels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, levels, [-(-n // 3) for n in shape])
    return coarse.repeat(3, 0).repeat(3, 1).repeat(3, 2)[: shape[0], : shape[1], : shape[2]] / (levels - 1)


def rows(output):
    with (output / "volumes.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def voxels(path):
    return np.asanyarray(nibabel.load(path).dataobj)


@pytest.mark.parametrize("code", ["RAS", "LPS", "ILA", "SAR"])
@pytest.mark.parametrize("shape", [(13, 17, 11), (5, 6, 7)])
def test_the_mask_lies_on_the_voxels_of_the_file(tmp_path, code, shape):
    array = blobs(shape)
    path = save(tmp_path / "scan.nii.gz", array, oblique(code))
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
    assert predict_volumes([path], checkpoint, tmp_path / "out") == 0
    mask = nibabel.load(tmp_path / "out" / "scan_mask.nii.gz")
    original = nibabel.load(path)
    assert np.array_equal(np.asanyarray(mask.dataobj), np.where(array > 0.5, 5, 0))
    assert mask.get_data_dtype() == np.uint8
    assert mask.affine.tobytes() == original.affine.tobytes()
    for key in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "srow_x", "srow_y", "srow_z"):
        assert mask.header[key].tobytes() == original.header[key].tobytes()
    (row,) = rows(tmp_path / "out")
    assert int(row["voxels"]) == (array > 0.5).sum()
    assert float(row["ml"]) == pytest.approx((array > 0.5).sum() * 0.7 * 1.1 * 3.0 / 1000, rel=1e-4)
    world = nibabel.affines.apply_affine(original.affine, np.argwhere(array > 0.5)).mean(axis=0)
    assert [float(row[f"centroid_{axis}_mm"]) for axis in "ras"] == pytest.approx(world, abs=2e-3)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"tta": "flips", "overlap": 0.25}, marks=pytest.mark.slow)],  # eight views of each window
)
@pytest.mark.parametrize(("spacing", "memory"), [(None, 1_400_000), ((1.5, 1.5, 1.5), 600_000)])
def test_a_memory_bound_changes_nothing(tmp_path, monkeypatch, spacing, memory, options):
    """Files instead of memory, and strips of rows: every byte is the same."""
    shape = (40, 150, 20)
    path = save(tmp_path / "scan.nii.gz", blobs(shape, levels=4), oblique("LAS", (1, 1, 1)))
    labels = {name: value for value, name in enumerate("abcd")}
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", labels, spacing=spacing, tilt=0.2, patch=(8, 16, 8))
    wanted = {"probabilities": True, "uncertainty": True, **options}
    assert predict_volumes([path], checkpoint, tmp_path / "free", **wanted) == 0
    monkeypatch.setattr("visattn.scratch.SMALL", 0)
    monkeypatch.setattr("visattn.predict_volumes_run._LEAST", 0)
    monkeypatch.setattr("visattn.predict_volumes_run.peak_bytes", lambda: 0)
    seen = []
    from visattn import volume_inference

    strips = volume_inference._strips

    def spy(*arguments):
        seen.append(strips(*arguments))
        return seen[-1]

    monkeypatch.setattr("visattn.volume_inference._strips", spy)
    assert predict_volumes([path], checkpoint, tmp_path / "bound", memory=memory, **wanted) == 0
    assert len(seen[0]) > 1
    files = sorted(file.name for file in (tmp_path / "free").glob("*.nii.gz"))
    assert len(files) == 3 + ("tta" in options)
    for file in files:
        assert (tmp_path / "bound" / file).read_bytes() == (tmp_path / "free" / file).read_bytes()
    assert not [entry for entry in (tmp_path / "bound").iterdir() if entry.name.startswith((".", "tmp"))]


def test_probabilities_entropy_and_variance(tmp_path):
    array = blobs((12, 10, 9), levels=3)
    path = save(tmp_path / "scan.nii", array, oblique("RAS"))
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", {"none": 0, "rim": 3, "core": 300}, tilt=0.4)
    options = {"probabilities": True, "uncertainty": True, "overlays": True, "tta": "flips"}
    assert predict_volumes([path], checkpoint, tmp_path / "out", **options) == 0
    mask = voxels(tmp_path / "out" / "scan_mask.nii.gz")
    assert mask.dtype == np.uint16
    found = voxels(tmp_path / "out" / "scan_prob.nii.gz")
    assert found.shape == (12, 10, 9, 3)
    np.testing.assert_allclose(found.sum(axis=-1), 1, atol=1e-5)
    assert np.array_equal(np.array([0, 3, 300])[found.argmax(axis=-1)], mask)
    expected = entropy(torch.from_numpy(np.moveaxis(found, -1, 0).copy()), "softmax")
    np.testing.assert_allclose(voxels(tmp_path / "out" / "scan_uncertainty.nii.gz"), expected, atol=1e-6)
    assert 0 < expected.max() <= 1
    assert voxels(tmp_path / "out" / "scan_variance.nii.gz").max() > 1e-4  # the tilt makes mirror images differ
    assert (tmp_path / "out" / "overlays" / "scan.png").stat().st_size > 1000


def test_regions_are_painted_by_nesting(tmp_path):
    array = blobs((9, 9, 9), levels=2)
    path = save(tmp_path / "scan.nii.gz", array, np.eye(4))
    regions = {"whole": ["oedema", "core"], "inner": ["core"]}
    checkpoint = stub.write_checkpoint(
        tmp_path / "c.ckpt", {"none": 0, "oedema": 2, "core": 4}, regions=regions, shift=-0.5
    )
    # Channel 0 is a sigmoid of -40 |x + 0.5|, channel 1 of -40 |x - 0.5|: never above 1/2, but equal to it nowhere.
    assert predict_volumes([path], checkpoint, tmp_path / "out") == 0
    assert not voxels(tmp_path / "out" / "scan_mask.nii.gz").any()
    checkpoint = stub.write_checkpoint(tmp_path / "d.ckpt", {"none": 0, "oedema": 2, "core": 4}, regions=regions)
    assert predict_volumes([path], checkpoint, tmp_path / "out2") == 0
    # At 0 the outer channel has a probability of 1/2, at 1 the inner one: that paints its own label.
    assert np.array_equal(voxels(tmp_path / "out2" / "scan_mask.nii.gz"), np.where(array > 0.5, 4, 2))


def test_folds_predict_together_and_bad_cases_fail_alone(tmp_path, capfd):
    good = save(tmp_path / "in" / "a.nii.gz", blobs((9, 8, 7)), oblique("PIR"))
    (tmp_path / "in" / "b.nii.gz").write_bytes(good.read_bytes()[:-20])  # the header is whole
    (tmp_path / "in" / "c.nii").write_bytes(b"not an image")
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
    out = tmp_path / "out"
    assert predict_volumes([tmp_path / "in"], checkpoint, out) == 1
    assert (out / "a_mask.nii.gz").exists()
    assert not list(out.glob("[bc]*"))
    told = capfd.readouterr().err
    assert "about" in told.splitlines()[0]
    assert "1 predicted" in told
    assert "2 failed" in told
    states = {entry["case"]: entry for entry in json.loads((out / "manifest.json").read_text())["cases"]}
    assert states["b"]["error"].count("truncated") == 1
    page = (out / "report.html").read_text()
    assert "truncated" in page
    # again: nothing is done twice
    before = (out / "a_mask.nii.gz").stat().st_mtime_ns
    assert predict_volumes([tmp_path / "in"], checkpoint, out) == 1
    assert (out / "a_mask.nii.gz").stat().st_mtime_ns == before
    assert "1 unchanged and kept" in capfd.readouterr().err
    predictor = visattn.load(checkpoint)
    members = (predictor.checkpoints[0], predictor.checkpoints[0])
    assert predict_volumes([good], checkpoint, tmp_path / "two", members=members, uncertainty=True) == 0
    assert (voxels(tmp_path / "two" / "a_mask.nii.gz") == voxels(out / "a_mask.nii.gz")).all()
    assert not voxels(tmp_path / "two" / "a_variance.nii.gz").any()  # the folds are equal


def test_channels_by_suffix_and_table(tmp_path):
    array = blobs((8, 9, 10))
    for name, values in (("0000", array), ("0001", 1 - array)):
        save(tmp_path / "in" / f"p_{name}.nii.gz", values, oblique("RAS"))
    save(tmp_path / "in" / "q_0000.nii.gz", array, oblique("RAS"))
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", channels=("t1c", "flair"))
    assert predict_volumes([tmp_path / "in"], checkpoint, tmp_path / "out") == 1  # q has no flair
    assert np.array_equal(voxels(tmp_path / "out" / "p_mask.nii.gz"), 5 * array)
    table = tmp_path / "cases.csv"
    table.write_text("case,flair,t1c\nx,in/p_0000.nii.gz,in/p_0001.nii.gz\n")
    code = main(["predict", "--cases", str(table), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "t")])
    assert code == 0
    assert np.array_equal(voxels(tmp_path / "t" / "x_mask.nii.gz"), 5 - 5 * array)


def test_bids_names(tmp_path):
    for name in ("sub-01/anat/sub-01_ses-2_T1w.nii.gz", "loose.nii.gz"):
        save(tmp_path / "in" / name, blobs((6, 6, 6)), np.eye(4))
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
    assert predict_volumes([tmp_path / "in"], checkpoint, tmp_path / "out", bids=True) == 0
    assert (tmp_path / "out" / "sub-01" / "anat" / "sub-01_ses-2_desc-visattn_dseg.nii.gz").exists()
    assert (tmp_path / "out" / "sub-loose" / "anat" / "sub-loose_desc-visattn_dseg.nii.gz").exists()
    description = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert "5\tlesion" in (tmp_path / "out" / "desc-visattn_dseg.tsv").read_text()


def test_from_python(tmp_path):
    array = blobs((9, 8, 7)).astype(np.float32)
    path = save(tmp_path / "scan.nii.gz", array, oblique("LAS"))
    predictor = visattn.load(stub.write_checkpoint(tmp_path / "c.ckpt"))
    assert np.array_equal(predictor.predict(path), 5 * array)
    geometry = Geometry(array.shape, oblique("LAS"))
    assert np.array_equal(predictor.predict(array, geometry), 5 * array)
    assert predictor.predict_proba(array, geometry).shape == (1, 9, 8, 7)
    with pytest.raises(UserError, match="geometry"):
        predictor.predict(array)


def test_images_and_volumes_are_not_mistaken(tmp_path, capsys):
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
    scan = save(tmp_path / "scan.nii.gz", blobs((6, 6, 6)), np.eye(4))
    common = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main(["predict", str(scan), "--threshold", "0.4", *common]) == 2
    assert "takes volumes" in capsys.readouterr().err
    assert main(["predict", str(scan), "--memory", "1M", *common]) == 2
    assert "do not suffice" in capsys.readouterr().err
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(400))
    assert main(["predict", str(tmp_path / "photo.png"), *common]) == 1
    assert "PNG image" in capsys.readouterr().err


def test_names_are_escaped_in_the_report(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    save(tmp_path / "in" / f"{name}.nii.gz", blobs((6, 6, 6)), np.eye(4))
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", {"none": 0, "<b>x": 1})
    assert predict_volumes([tmp_path / "in"], checkpoint, tmp_path / "out") == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<img src=x" not in page
    assert "<b>x" not in page
    assert "&lt;b&gt;x" in page


if sys.platform == "linux":

    def test_a_full_disk_is_told_before_a_file_with_holes_is_made(tmp_path, monkeypatch):
        from visattn.scratch import Scratch

        with pytest.raises(OSError, match=r"No space|too large"):
            Scratch(tmp_path).zeros([1 << 50], np.uint8)
        assert list(tmp_path.iterdir()) == []
