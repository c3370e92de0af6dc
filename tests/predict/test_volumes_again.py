"""What an earlier run left within the input is no input, and steps of the checkpoint change masks."""

import importlib.util
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import visattn
import visattn.networks
from visattn.data.volumes import find_volume_cases
from visattn.predict_plan import find_images
from visattn.predict_volumes import predict_volumes

_spec = importlib.util.spec_from_file_location("volume_stub", Path(__file__).parent / "volume_stub.py")
stub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub)
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


@pytest.fixture(autouse=True)
def bright_network(monkeypatch):
    monkeypatch.setattr(visattn.networks, "create_model", stub.create_model)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), AFFINE), path)
    return path


def scene():
    """Two parts of 27 and 4 voxels of 6 ml / 1000, the larger one hollow."""
    array = np.zeros((12, 12, 12))
    array[2:5, 2:5, 2:5], array[8, 8, 2:6] = 1, 1
    array[3, 3, 3] = 0
    return array


def voxels(path):
    return np.asanyarray(nibabel.load(path).dataobj)


@pytest.mark.parametrize("bids", [False, True])
@pytest.mark.parametrize("where", ["masks", "site/deep"])
def test_an_earlier_output_within_the_input_is_left_out(tmp_path, caplog, where, bids):
    scans = tmp_path / "scans"
    for name in ("sub-1_T1w", "inner/b"):
        save(scans / f"{name}.nii.gz", scene())
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
    options = {"bids": bids, "uncertainty": True, "tta": "flips"}
    assert predict_volumes([scans], checkpoint, scans / where, **options) == 0
    assert predict_volumes([scans], checkpoint, tmp_path / "other", **options) == 0
    first, second = (sorted(p.relative_to(f) for p in f.rglob("*.nii.gz")) for f in (scans / where, tmp_path / "other"))
    assert first == second
    assert len(first) == 6
    assert "written by an earlier visattn predict" in caplog.text


@pytest.mark.parametrize(
    "beside", ["sub-1_desc-visattn_dseg", "sub-1_desc-visattn_stat-entropy_statmap", "sub-1_T1w_variance"]
)
def test_maps_beside_their_image_are_left_out(tmp_path, beside):
    for name in ("sub-1_T1w", beside, "other_desc-visattn_dseg"):
        save(tmp_path / f"{name}.nii.gz", scene())
    cases, problems = find_volume_cases([tmp_path], ["t1"])
    assert [case.name for case in cases] == ["other_desc-visattn_dseg", "sub-1_T1w"]
    assert problems == []


def test_a_manifest_of_another_tool_hides_nothing(tmp_path):
    save(tmp_path / "a.nii.gz", scene())
    for text in ("", "[]", '{"cases": 3}', '{"cases": [{"mask": 1}]}', "[" * 9000):
        (tmp_path / "manifest.json").write_text(text)
        assert [case.name for case in find_volume_cases([tmp_path], ["t1"])[0]] == ["a"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([], 30), (["keep_largest"], 26), (["fill_holes"], 31), ([{"name": "remove_small", "ml": 0.03}], 26)],
)
def test_predict_takes_the_steps_of_the_checkpoint(tmp_path, steps, expected):
    path = save(tmp_path / "a.nii.gz", scene())
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", steps=steps)
    assert predict_volumes([path], checkpoint, tmp_path / "out") == 0
    mask = voxels(tmp_path / "out" / "a_mask.nii.gz")
    assert (mask == 5).sum() == expected
    table = (tmp_path / "out" / "volumes.csv").read_text()
    assert f",{expected}," in table
    assert np.array_equal(visattn.load(checkpoint).predict(path), mask)


def test_a_memory_bound_changes_nothing_of_it(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    array = rng.random((40, 60, 20)).repeat(2, 0) > 0.8
    path = save(tmp_path / "a.nii.gz", array)
    steps = [{"name": "remove_small", "voxels": 9}, "fill_holes"]
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", steps=steps)
    assert predict_volumes([path], checkpoint, tmp_path / "free") == 0
    from visattn import predict_volumes_run, scratch

    monkeypatch.setattr(predict_volumes_run.Run, "_left", lambda self: 900_000)
    monkeypatch.setattr(scratch, "SMALL", 0)
    assert predict_volumes([path], checkpoint, tmp_path / "bound") == 0
    free, bound = (voxels(tmp_path / name / "a_mask.nii.gz") for name in ("free", "bound"))
    assert np.array_equal(free, bound)
    assert 0 < (free > 0).sum() != array.sum()


def test_masks_of_images_are_no_images_either(tmp_path):
    for name in ("a.png", "masks/a.png", "masks/mine.png", "masks/overlays/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    content = {"cases": [{"mask": "a.png", "files": {"a.png": "0", "overlays/a.png": "0"}}]}
    (tmp_path / "masks" / "manifest.json").write_text(json.dumps(content))
    found = find_images([tmp_path], tmp_path / "other")
    assert [str(relative) for _, relative in found] == ["a.png", "masks/mine.png"]
