"""An identity predictor returns every volume as it was: its voxels and its place in space, whatever these are."""

import csv
import importlib.util
import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

import visattn.networks
from visattn.cli import main

_spec = importlib.util.spec_from_file_location("volume_stub", Path(__file__).parent / "volume_stub.py")
stub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub)

ORIENTATIONS = [
    np.eye(3)[:, list(axes)] * signs
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
FORM_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)
LABELS = {f"level {level}": level for level in range(12)}
CODES = ((1, 1), (0, 1), (1, 0), (2, 4), (1, 2))  # of qform and sform


@pytest.fixture(autouse=True)
def bright_network(monkeypatch):
    """Instead of that of images."""
    monkeypatch.setattr(visattn.networks, "create_model", stub.create_model)


def random_affine(rng, index):
    """One of the 48 orientations, turned by up to 40 degrees about any axis, anisotropic; some are sheared."""
    axis = rng.standard_normal(3)
    turn = Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.deg2rad(rng.uniform(0, 40))).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turn @ ORIENTATIONS[index % 48] * np.exp(rng.uniform(np.log(0.3), np.log(6), 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


def write_volumes(folder, count, seed=0, sheared=True):
    """Volumes of whole numbers 0 to 11, odd in size; name to what they hold."""
    rng = np.random.default_rng(seed)
    arrays = {}
    folder.mkdir()
    for index in range(count):
        shape = tuple(int(size) for size in rng.integers(2, 7, 3) * 2 + 1)  # 5 to 13
        array = rng.integers(0, len(LABELS), shape)
        affine = random_affine(rng, index)
        qform, sform = CODES[index % len(CODES)]
        if sheared and sform and index % 7 == 0:
            affine[:3, 1] += 0.04 * affine[:3, 0]
        kind = nibabel.Nifti2Image if index % 3 == 1 else nibabel.Nifti1Image
        image = kind((array / (len(LABELS) - 1)).astype(np.float32), None)
        image.header.set_qform(affine, qform)
        image.header.set_sform(affine, sform)
        name = f"v{index:03}"
        nibabel.save(image, folder / f"{name}.nii{'.gz' if index % 2 else ''}")
        arrays[name] = array
    return arrays


def predicted(tmp_path, arrays, *options):
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", LABELS, patch=(8, 6, 7), orientation="RAS")
    command = ["predict", str(tmp_path / "in"), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", *options]) == 0
    assert len(list((tmp_path / "out").glob("*_mask.nii.gz"))) == len(arrays)
    return tmp_path / "out"


def scan_of(folder, name):
    return next(folder.glob(f"{name}.nii*"))


def test_an_identity_predictor_returns_48_orientations_exactly(tmp_path):
    """Oblique, anisotropic, odd in size, both versions, every pair of codes; through the command, read by nibabel."""
    arrays = write_volumes(tmp_path / "in", 48)
    out = predicted(tmp_path, arrays)
    counted = {}
    with (out / "volumes.csv").open(newline="") as handle:
        for row in csv.DictReader(handle):
            counted[row["case"], row["class"]] = row
    for name, array in arrays.items():
        original, mask = nibabel.load(scan_of(tmp_path / "in", name)), nibabel.load(out / f"{name}_mask.nii.gz")
        assert np.array_equal(np.asanyarray(mask.dataobj), array), name
        assert type(mask) is type(original)
        assert mask.affine.tobytes() == original.affine.tobytes()
        for field in FORM_FIELDS:
            assert mask.header[field].tobytes() == original.header[field].tobytes(), (name, field)
        ml = abs(np.linalg.det(original.affine[:3, :3])) / 1000
        for level in (1, 11):
            row, places = counted[name, f"level {level}"], np.argwhere(array == level)
            assert int(row["voxels"]) == len(places)
            assert float(row["ml"]) == pytest.approx(len(places) * ml, rel=1e-5, abs=2e-6)
            if len(places):
                world = nibabel.affines.apply_affine(original.affine, places).mean(axis=0)
                assert [float(row[f"centroid_{axis}_mm"]) for axis in "ras"] == pytest.approx(world, abs=2e-3)


def test_probabilities_lie_where_the_volume_does(tmp_path):
    """As a float: the sigmoid's inverse of what is written is the volume."""
    write_volumes(tmp_path / "in", 8, seed=1, sheared=False)
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", patch=(8, 6, 7), orientation="LPI")
    command = ["predict", str(tmp_path / "in"), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main([*command, "--probabilities", "--device", "cpu"]) == 0
    for path in (tmp_path / "in").iterdir():
        original = nibabel.load(path)
        found = nibabel.load(tmp_path / "out" / f"{path.name.split('.')[0]}_prob.nii.gz")
        share = np.asanyarray(found.dataobj).astype(np.float64)
        np.testing.assert_allclose(np.log(share / (1 - share)) / 20 + 0.5, original.get_fdata(), atol=2e-4)
        assert found.affine.tobytes() == original.affine.tobytes()


@pytest.mark.slow  # imports MONAI; a hundred volumes
def test_other_readers_put_masks_where_they_put_scans(tmp_path):
    """Random affines, read back by nibabel, MONAI and, where it is installed, SimpleITK."""
    transforms = pytest.importorskip("monai.transforms")
    arrays = write_volumes(tmp_path / "in", 96, seed=2, sheared=False)
    out = predicted(tmp_path, arrays)
    from monai.data import MetaTensor, NibabelReader

    def load(path):
        reader = NibabelReader()
        values, meta = reader.get_data(reader.read(path))
        return MetaTensor(values, affine=meta["affine"])

    turn = transforms.Orientation("RAS", labels=None)
    itk = pytest.importorskip("SimpleITK") if importlib.util.find_spec("SimpleITK") else None
    for name, array in arrays.items():
        path, mask = scan_of(tmp_path / "in", name), out / f"{name}_mask.nii.gz"
        original = nibabel.load(path)
        assert np.array_equal(nibabel.load(mask).get_fdata(), array)
        scan, read = load(path), load(mask)
        assert np.array_equal(read.numpy(), array)
        assert np.array_equal(read.affine.numpy(), scan.affine.numpy())
        np.testing.assert_allclose(read.affine.numpy(), original.affine, atol=1e-6)
        both = turn(scan[None]), turn(read[None])
        np.testing.assert_allclose(both[0].numpy() * 11, both[1].numpy(), atol=1e-5)
        if itk is not None and type(original) is nibabel.Nifti1Image:  # it reads no others
            first, second = itk.ReadImage(str(path)), itk.ReadImage(str(mask))
            assert first.GetSpacing() == second.GetSpacing()
            assert first.GetDirection() == second.GetDirection()
            assert first.GetOrigin() == second.GetOrigin()
            assert np.array_equal(itk.GetArrayFromImage(second), array.transpose(2, 1, 0))


@pytest.mark.slow  # resamples
def test_resampling_and_back_moves_nothing(tmp_path):
    """A ball stays where it is, to the noise of voxels, although the network sees another grid than the file's."""
    rng = np.random.default_rng(3)
    (tmp_path / "in").mkdir()
    expected = {}
    for index in range(48):
        shape = np.array([41, 37, 45])
        affine = random_affine(rng, index)
        affine[:3, :3] *= 2.0 / np.linalg.norm(affine[:3, :3], axis=0) * rng.uniform(0.7, 1.4, 3)
        middle = nibabel.affines.apply_affine(affine, (shape - 1) / 2 + rng.uniform(-3, 3, 3))
        grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
        away = np.linalg.norm(nibabel.affines.apply_affine(affine, grid) - middle, axis=-1)
        array = np.clip((15 - away) / 4 + 0.5, 0, 1)  # 0.5 at 15 mm
        nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), tmp_path / "in" / f"v{index:03}.nii")
        expected[f"v{index:03}"] = middle
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", patch=(24, 24, 24), spacing=(1.7, 2.3, 2.0))
    command = ["predict", str(tmp_path / "in"), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu"]) == 0
    with (tmp_path / "out" / "volumes.csv").open(newline="") as handle:
        rows = {row["case"]: row for row in csv.DictReader(handle)}
    for name, middle in expected.items():
        found = [float(rows[name][f"centroid_{axis}_mm"]) for axis in "ras"]
        assert found == pytest.approx(middle, abs=0.3), name
        assert float(rows[name]["ml"]) == pytest.approx(4 / 3 * np.pi * 15**3 / 1000, rel=0.07)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["cases"][0]["size"] == [41, 37, 45]
