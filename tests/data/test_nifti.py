"""NIfTI in and out: geometry kept bit for bit, values right, and everything unfit refused by name."""

import gzip
import importlib.util
import itertools
import os
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data import nifti
from visattn.data.geometry import Geometry
from visattn.errors import UserError

_SPEC = importlib.util.spec_from_file_location("bad_volumes", Path(__file__).with_name("bad_volumes.py"))
bad = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bad)

FORM_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "xyzt_units"),
)


def rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    return q * np.sign(np.diag(r))


def affine_of(directions, zooms, origin=(10.5, -20.25, 7.125)):
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions) * np.asarray(zooms)
    affine[:3, 3] = origin
    return affine


def save(path, data, affine, sform=1, qform=1, header=None):
    image = nibabel.Nifti1Image(data, None, header)
    image.header.set_data_dtype(data.dtype)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    nibabel.save(image, path)
    return path


ORIENTATIONS = [
    np.eye(3)[:, list(axes)] * signs
    for axes in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("oblique", [False, True])
def test_every_orientation_comes_back_bit_for_bit(tmp_path, oblique):
    """All 48, anisotropic, square and oblique: values, affine, both forms and their codes."""
    data = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    turn = rotation(1) if oblique else np.eye(3)
    assert len(ORIENTATIONS) == 48
    for index, directions in enumerate(ORIENTATIONS):
        affine = affine_of(turn @ directions, (0.7, 1.3, 5.0))
        path = save(tmp_path / "in.nii.gz", data, affine, sform=index % 3 and 2, qform=1)
        original = nibabel.load(path)
        values, geometry = nifti.read(path)
        assert np.array_equal(values, data)
        assert np.array_equal(geometry.affine, original.affine)
        assert geometry.orientation == "".join(nibabel.aff2axcodes(original.affine))
        np.testing.assert_allclose(geometry.zooms, (0.7, 1.3, 5.0), rtol=1e-6)
        assert geometry.voxel_ml == pytest.approx(0.7 * 1.3 * 5.0 / 1000, rel=1e-6)
        nifti.write(tmp_path / "out.nii.gz", values, geometry, "image")
        back = nibabel.load(tmp_path / "out.nii.gz")
        assert np.array_equal(back.get_fdata(dtype=np.float32), data)
        for field in FORM_FIELDS:
            assert back.header[field].tobytes() == original.header[field].tobytes(), field
        assert np.array_equal(back.get_qform(), original.get_qform())
        assert np.array_equal(nifti.read(tmp_path / "out.nii.gz")[1].affine, geometry.affine)


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "f4", "f8"])
def test_every_type_and_scaling_reads_as_nibabel_does(tmp_path, dtype):
    data = np.random.default_rng(0).integers(0, 100, (4, 3, 5)).astype(dtype)
    for scaling in (
        {},
        {"scl_slope": 0.5, "scl_inter": -3.0},
        {"scl_slope": 2.0, "scl_inter": 0.0},
        {"scl_slope": 0.0},
    ):
        (tmp_path / "a.nii").write_bytes(bad.with_fields(bad.nifti_of(data), **scaling))
        expected = nibabel.load(tmp_path / "a.nii").get_fdata()
        values, _ = nifti.read(tmp_path / "a.nii")
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_large_integers_are_scaled_before_they_are_rounded(tmp_path):
    """2**24 + 3 is no float32, but 3 is."""
    content = bad.nifti_of(np.full((1, 1, 1), 2**24 + 3, np.int32))
    (tmp_path / "a.nii").write_bytes(bad.with_fields(content, scl_slope=1.0, scl_inter=-(2.0**24)))
    assert nifti.read(tmp_path / "a.nii")[0].item() == 3.0


def test_big_endian_and_nifti_2_and_odd_names(tmp_path):
    expected = np.arange(210).reshape(bad.SHAPE)
    for name, content in (
        ("a.nii", bad.big_endian()),
        ("b.dat", nibabel.Nifti2Image(expected.astype(np.int16), np.eye(4)).to_bytes()),
        ("c.nii", bad.packed(bad.nifti_of(expected.astype(np.float32)))),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert nifti.is_nifti(path)
        values, geometry = nifti.read(path)
        assert np.array_equal(values, expected)
        nifti.write(tmp_path / "out.nii", values, geometry, "image")
        back = nibabel.load(tmp_path / "out.nii")
        assert np.array_equal(back.get_fdata(), expected)
        assert np.array_equal(back.affine, geometry.affine)
        assert type(back).__name__ == ("Nifti2Image" if name == "b.dat" else "Nifti1Image")


def test_long_axes_become_nifti_2(tmp_path):
    geometry = Geometry((40000, 1, 1), np.eye(4))
    nifti.write(tmp_path / "a.nii.gz", np.zeros((40000, 1, 1)), geometry, "labels")
    assert isinstance(nibabel.load(tmp_path / "a.nii.gz"), nibabel.Nifti2Image)
    assert nifti.read(tmp_path / "a.nii.gz")[1].shape == (40000, 1, 1)


def test_axes_of_length_one_and_channels(tmp_path):
    data = np.random.default_rng(0).standard_normal((3, 4, 5, 2)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "four.nii")
    for axis in (3, -1):
        values, geometry = nifti.read(tmp_path / "four.nii", channel_axis=axis)
        assert geometry.shape == (3, 4, 5)
        assert np.array_equal(values, np.moveaxis(data, 3, 0))
    assert nifti.read_header(tmp_path / "four.nii", channel_axis=3).channels == 2
    nifti.write(tmp_path / "back.nii.gz", values, geometry, "image")
    assert np.array_equal(nibabel.load(tmp_path / "back.nii.gz").get_fdata(), data)
    with pytest.raises(UserError, match="has no axis 4"):
        nifti.read(tmp_path / "four.nii", channel_axis=4)
    nibabel.save(nibabel.Nifti1Image(data[:, :, :, None, :], np.eye(4)), tmp_path / "five.nii")
    assert np.array_equal(nifti.read(tmp_path / "five.nii", channel_axis=4)[0], np.moveaxis(data, 3, 0))
    nibabel.save(nibabel.Nifti1Image(data[..., :1], np.eye(4)), tmp_path / "one.nii")
    assert np.array_equal(nifti.read(tmp_path / "one.nii")[0], data[..., 0])
    nibabel.save(nibabel.Nifti1Image(data[:, :, 0, 0], np.eye(4)), tmp_path / "flat.nii")
    assert nifti.read(tmp_path / "flat.nii")[0].shape == (3, 4, 1)


def test_the_sform_wins_and_a_difference_is_told(tmp_path):
    data = np.zeros((10, 10, 10), np.uint8)
    for shift, warned in ((0.0, False), (1e-6, False), (0.01, True)):
        image = nibabel.Nifti1Image(data, np.eye(4))
        image.set_sform(affine_of(np.eye(3), (2, 2, 2), (shift, 0, 0)), 1)
        image.set_qform(affine_of(np.eye(3), (2, 2, 2), (0, 0, 0)), 1)
        nibabel.save(image, tmp_path / "a.nii")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, geometry = nifti.read(tmp_path / "a.nii")
        assert bool(caught) == warned
        assert geometry.affine[0, 3] == pytest.approx(shift)
        if warned:
            assert issubclass(caught[0].category, nifti.NiftiWarning)
            assert "0.01 mm apart; the sform is used" in str(caught[0].message)
    # A difference of the voxel sizes grows towards the far corner.
    image.set_sform(np.diag([2.0002, 2, 2, 1]), 1)
    nibabel.save(image, tmp_path / "a.nii")
    with pytest.warns(nifti.NiftiWarning, match=r"0\.0018 mm apart"):
        nifti.read(tmp_path / "a.nii")


def test_without_forms_the_voxel_sizes_count(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((3, 4, 5), np.uint8), np.diag([1, 2, 3, 1.0]), sform=0, qform=0)
    assert nifti.read(path)[1].zooms == (1, 2, 3)
    assert np.array_equal(nifti.read(path)[1].affine, nibabel.load(path).affine)


def test_shear_keeps_the_voxel_volume(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.5
    image = nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), affine)
    image.set_qform(np.eye(4), 0)
    nibabel.save(image, tmp_path / "a.nii")
    geometry = nifti.read(tmp_path / "a.nii")[1]
    assert geometry.voxel_ml == pytest.approx(1e-3)
    assert geometry.zooms[1] == pytest.approx(np.sqrt(1.25))
    assert geometry.shear == pytest.approx(0.5 / np.sqrt(1.25))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    zooms=st.tuples(*[st.floats(0.2, 8)] * 3),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
)
def test_random_geometries_round_trip(tmp_path_factory, seed, zooms, shape, origin):
    folder = tmp_path_factory.mktemp("geometry")
    data = np.random.default_rng(seed).integers(0, 5, shape).astype(np.uint8)
    path = save(folder / "in.nii.gz", data, affine_of(rotation(seed), zooms, origin))
    labels, geometry = nifti.read_labels(path)
    nifti.write(folder / "out.nii.gz", labels, geometry, "labels")
    again, same = nifti.read_labels(folder / "out.nii.gz")
    assert np.array_equal(again, data)
    assert again.dtype == np.uint8
    assert np.array_equal(same.affine, geometry.affine)
    assert same.same_grid(geometry)
    back = nibabel.load(folder / "out.nii.gz")
    assert np.array_equal(back.affine, nibabel.load(path).affine)
    assert np.array_equal(np.asarray(back.dataobj), data)


def test_same_grid_forgives_noise_alone():
    geometry = Geometry((100, 100, 100), np.eye(4))
    noisy = Geometry((100, 100, 100), np.eye(4) + 1e-6 * np.random.default_rng(0).uniform(-1, 1, (4, 4)))
    moved = Geometry((100, 100, 100), np.diag([1.001, 1, 1, 1]))
    assert geometry.same_grid(noisy)
    assert not geometry.same_grid(moved)
    assert moved.distance(geometry) == pytest.approx(0.099)
    assert not geometry.same_grid(Geometry((100, 100, 99), np.eye(4)))


@pytest.mark.parametrize("name", bad.CASES)
def test_unfit_files_are_refused(tmp_path, name):
    content, message = bad.CASES[name]
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content())
    with pytest.raises(UserError, match=message) as error:
        nifti.read(path)
    text = str(error.value)
    assert text.startswith(str(path))
    assert len(text.splitlines()) <= 3


def test_there_are_many_unfit_files():
    assert len(bad.CASES) + len(bad.LABELS) >= 60


@pytest.mark.parametrize("name", bad.LABELS)
def test_unfit_labels_are_refused(tmp_path, name):
    content, message = bad.LABELS[name]
    (tmp_path / "a.nii").write_bytes(content())
    with pytest.raises(UserError, match=message):
        nifti.read_labels(tmp_path / "a.nii")


def test_labels_stored_as_numbers_with_noise(tmp_path):
    data = np.array([0, 0.99999997, 2.0004, 300]).reshape(4, 1, 1)
    (tmp_path / "a.nii").write_bytes(bad.nifti_of(data))
    labels, _ = nifti.read_labels(tmp_path / "a.nii")
    assert labels.ravel().tolist() == [0, 1, 2, 300]
    assert labels.dtype == np.uint16


def test_missing_folder_and_forbidden(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        nifti.read(tmp_path / "a.nii")
    with pytest.raises(UserError, match="is a folder"):
        nifti.read(tmp_path)
    assert not nifti.is_nifti(tmp_path / "a.nii")
    (tmp_path / "b.nii").write_bytes(bad.PLAIN)
    (tmp_path / "b.nii").chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(UserError, match="permission denied"):
            nifti.read(tmp_path / "b.nii")


def test_memory_is_not_taken_for_what_a_header_claims(tmp_path):
    import tracemalloc

    (tmp_path / "a.nii").write_bytes(bad.volume(dim=bad.dims(1000, 1000, 1000)))
    (tmp_path / "b.nii").write_bytes(bad.bomb())
    tracemalloc.start()
    for name in ("a.nii", "b.nii"):
        with pytest.raises(UserError):
            nifti.read(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    (tmp_path / "c.nii").write_bytes(bad.PLAIN)
    with pytest.raises(UserError, match=r"more than the limit of 0\.0 GiB"):
        nifti.read(tmp_path / "c.nii", budget=800)


def test_gzip_of_several_members_with_padding(tmp_path):
    """Written by pigz or by appending; members end anywhere, also within the header or a voxel."""
    rng = np.random.default_rng(0)
    data = rng.integers(-1000, 1000, (61, 67, 71)).astype(np.int16)  # several pieces of the reader
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    content = (tmp_path / "a.nii").read_bytes()
    cuts = [0, 100, 353, 1001, 300_000, len(content)]
    members = [gzip.compress(content[a:b], 1) for a, b in itertools.pairwise(cuts)]
    (tmp_path / "b.nii.gz").write_bytes(b"\0\0\0".join(members) + bytes(512))
    assert np.array_equal(nifti.read(tmp_path / "b.nii.gz")[0], data)
    members[2] = members[2][:-6] + bytes([members[2][-6] ^ 1]) + members[2][-5:]
    (tmp_path / "c.nii.gz").write_bytes(b"".join(members))
    with pytest.raises(UserError, match="wrong checksum"):
        nifti.read(tmp_path / "c.nii.gz")
    (tmp_path / "d.nii.gz").write_bytes(b"".join(members[:2]))
    with pytest.raises(UserError, match="truncated"):
        nifti.read(tmp_path / "d.nii.gz")


def test_streamed_slabs_make_the_same_file(tmp_path):
    data = np.random.default_rng(0).integers(0, 3, (4, 5, 9)).astype(np.uint8)
    geometry = Geometry((4, 5, 9), affine_of(rotation(3), (1, 2, 3)))
    for name in ("a.nii.gz", "a.nii"):
        nifti.write(tmp_path / f"whole_{name}", data, geometry, "labels")
        with nifti.StreamWriter(tmp_path / f"slabs_{name}", geometry, np.uint8, labels=True) as writer:
            for start in (0, 1, 5):
                writer.append(data[:, :, start : {0: 1, 1: 5, 5: 9}[start]])
        assert (tmp_path / f"whole_{name}").read_bytes() == (tmp_path / f"slabs_{name}").read_bytes()
    header = nibabel.load(tmp_path / "whole_a.nii").header
    assert header["intent_code"] == 1002
    raw = nibabel.Nifti1Header((tmp_path / "whole_a.nii").read_bytes()[:348], check=False)
    assert (raw["scl_slope"], raw["scl_inter"]) == (1, 0)


def test_an_unfinished_file_never_gets_its_name(tmp_path):
    geometry = Geometry((2, 2, 4), np.eye(4))
    path = tmp_path / "a.nii.gz"

    def write(*slabs):
        with nifti.StreamWriter(path, geometry, np.uint8) as writer:
            for slab in slabs:
                if slab is None:
                    raise KeyboardInterrupt
                writer.append(slab)

    with pytest.raises(ValueError, match="8 voxels were never written"):
        write(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="does not fit"):
        write(np.zeros((2, 2, 5)))
    with pytest.raises(KeyboardInterrupt):
        write(np.zeros((2, 2, 4)), None)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused(tmp_path):
    geometry = Geometry((2, 2, 2), np.eye(4))
    with pytest.raises(ValueError, match="does not lie on a grid"):
        nifti.write(tmp_path / "a.nii", np.zeros((2, 2, 3)), geometry, "image")
    with pytest.raises(ValueError, match="labels must be whole numbers"):
        nifti.write(tmp_path / "a.nii", np.full((2, 2, 2), 0.5), geometry, "labels")
    with pytest.raises(UserError, match=r"ends in \.nii or \.nii\.gz"):
        nifti.write(tmp_path / "a.png", np.zeros((2, 2, 2)), geometry, "labels")
    assert list(tmp_path.iterdir()) == []


def test_real_volumes_read_as_nibabel_reads_them(real_data, tmp_path):
    files = sorted((real_data / "nifti_unlabelled").glob("*.nii.gz")) + sorted(
        (real_data / "hippocampus").rglob("*_00*.nii.gz")
    )
    assert len(files) > 5
    for path in files:
        values, geometry = nifti.read(path)
        original = nibabel.load(path)
        np.testing.assert_allclose(values, original.get_fdata(dtype=np.float32), rtol=1e-5, atol=1e-5)
        assert np.array_equal(geometry.affine, original.affine)
    masks = sorted((real_data / "hippocampus/labelsTr").glob("*.nii.gz"))
    assert {int(value) for path in masks[:30] for value in np.unique(nifti.read_labels(path)[0])} == {0, 1, 2}
