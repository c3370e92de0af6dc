"""Reading cases: all channels on the first one's grid, whatever theirs; labels on the image's or refused."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import nibabel
import nibabel.processing
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data.geometry import Geometry
from visattn.data.regrid import coverage, regrid, turned
from visattn.data.volumes import (
    VolumeCase,
    find_training_cases,
    image_geometry,
    read_case,
    read_case_label,
)
from visattn.errors import UserError
from visattn.labels import IGNORE, Labels

LABELS = Labels.from_config({"background": 0, "tumour": 1, "oedema": 4}, ignore=9)


def rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((3, 3)))
    return q * np.sign(np.diag(r))


def affine_of(directions, zooms, origin=(10.5, -20.25, 7.125)):
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(directions) * np.asarray(zooms)
    affine[:3, 3] = origin
    return affine


def save(path, data, affine, qform=None):
    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine if qform is None else qform, 1)
    nibabel.save(image, path)
    return path


def case_of(*images, label=None, **options):
    return VolumeCase("case", tuple(images), label, "case", "root", **options)


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


AFFINE = affine_of(rotation(1), (1.0, 1.5, 3.0))


# Channels


def test_channels_of_one_grid_are_stacked(tmp_path):
    data = noise((2, 5, 6, 7))
    paths = [save(tmp_path / f"{c}.nii.gz", data[c], AFFINE) for c in range(2)]
    array, geometry, notes = read_case(case_of(*paths))
    np.testing.assert_array_equal(array, data)
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-5)
    assert array.dtype == np.float32
    assert notes == []
    assert image_geometry(case_of(*paths)).same_grid(geometry)


def test_noise_of_the_header_is_no_difference(tmp_path):
    """Exact values, and nothing said: 1e-4 mm are not worth an interpolation."""
    data = noise((2, 5, 6, 7))
    moved = AFFINE + np.random.default_rng(0).uniform(-1e-5, 1e-5, (4, 4)) * [[1], [1], [1], [0]]
    array, _, notes = read_case(
        case_of(save(tmp_path / "a.nii", data[0], AFFINE), save(tmp_path / "b.nii", data[1], moved))
    )
    np.testing.assert_array_equal(array, data)
    assert notes == []


@pytest.mark.parametrize(
    ("axes", "signs"),
    [*itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3))][1::5],
)
def test_turned_axes_cost_no_interpolation(tmp_path, axes, signs):
    """The second channel is stored along other axes: it comes back to the last bit."""
    data = noise((5, 6, 7), 1)
    start = nibabel.Nifti1Image(data, AFFINE)
    ornt = np.array([[list(axes).index(axis), signs[axis]] for axis in range(3)], float)
    other = start.as_reoriented(ornt)
    assert other.shape == tuple(np.array(data.shape)[list(axes)])
    first = save(tmp_path / "a.nii", np.zeros((5, 6, 7), np.float32), AFFINE)
    array, _, notes = read_case(case_of(first, save(tmp_path / "b.nii", np.asarray(other.dataobj), other.affine)))
    np.testing.assert_array_equal(array[1], data)
    assert len(notes) == 1
    assert "turned" in notes[0]
    assert str(tmp_path / "b.nii") in notes[0]


def test_another_grid_is_resampled_with_a_note(tmp_path):
    other = affine_of(rotation(2), (1.1, 1.2, 1.3), (-5, -40, -5))
    values = noise((40, 40, 40), 3)
    paths = save(tmp_path / "a.nii", noise((5, 6, 7)), AFFINE), save(tmp_path / "b.nii", values, other)
    target = nibabel.load(paths[0])
    middle = affine_of(rotation(2), (1.1, 1.2, 1.3))
    middle[:3, 3] = (target.affine @ [2, 2.5, 3, 1])[:3] - middle[:3, :3] @ [19.5, 19.5, 19.5]
    save(paths[1], values, middle)
    array, geometry, (note,) = read_case(case_of(*paths))
    theirs = nibabel.processing.resample_from_to(nibabel.load(paths[1]), target, order=1)
    np.testing.assert_allclose(array[1], theirs.get_fdata(), atol=1e-4)
    assert geometry.shape == (5, 6, 7)
    assert "another grid (40 x 40 x 40 of 1.1 x 1.2 x 1.3 mm) than a.nii (5 x 6 x 7 of 1 x 1.5 x 3 mm)" in note
    assert "covers" not in note


@settings(max_examples=40, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    zooms=st.tuples(*[st.floats(0.3, 5)] * 6),
    shift=st.tuples(*[st.floats(-4, 4)] * 3),
    shear=st.floats(-0.3, 0.3),
)
def test_a_field_linear_in_mm_is_the_same_on_any_two_grids(seeds, zooms, shift, shear):
    """Linear interpolation is exact for it: any error in the affines' composition shows, oblique, sheared, mirrored."""
    first = affine_of(rotation(seeds[0]) @ np.array([[1, shear, 0], [0, 1, 0], [0, 0, -1]]), zooms[:3])
    target = Geometry((5, 6, 7), first)
    second = affine_of(rotation(seeds[1]), zooms[3:])
    centre = (first @ [2, 2.5, 3, 1])[:3] + shift
    shape = (11, 12, 13)
    second[:3, 3] = centre - second[:3, :3] @ (np.array(shape) / 2 - 0.5)
    source = Geometry(shape, second)

    def field(geometry):
        at = np.stack(np.meshgrid(*map(np.arange, geometry.shape), np.ones(1), indexing="ij"), -1)[:, :, :, 0]
        return (at @ geometry.affine.T)[..., :3] @ [1.0, -2.0, 0.5]

    result = regrid(field(source).astype(np.float32), source, target)
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), np.ones(1), indexing="ij"), -1)[:, :, :, 0]
    at = index @ (np.linalg.inv(second) @ first).T
    inside = ((at[..., :3] >= 0) & (at[..., :3] <= np.array(shape) - 1)).all(-1)
    np.testing.assert_allclose(result[inside], field(target)[inside], atol=2e-3)


@pytest.mark.slow  # importing MONAI takes seconds
def test_monai_resamples_alike():
    torch = pytest.importorskip("torch")
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    values = noise((20, 22, 24))
    for seed in range(5):
        target = Geometry((5, 6, 7), affine_of(rotation(seed), (1.0, 1.5, 3.0)))
        source = Geometry(values.shape, affine_of(rotation(seed + 50), (1.1, 1.4, 0.9)))
        middle = (target.affine @ [2, 2.5, 3, 1])[:3] - source.affine[:3, :3] @ [9.5, 10.5, 11.5]
        source.affine[:3, 3] = middle
        theirs = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True, dtype=np.float64)(
            MetaTensor(torch.from_numpy(values)[None], affine=torch.from_numpy(source.affine)),
            dst_affine=torch.from_numpy(target.affine),
            spatial_size=target.shape,
        )
        np.testing.assert_allclose(regrid(values, source, target), theirs.numpy()[0], atol=1e-4)


def test_what_lies_beyond_takes_the_border():
    source = Geometry((4, 4, 4), np.eye(4))
    target = Geometry((8, 4, 4), affine_of(np.eye(3), (1, 1, 1), (-2, 0, 0)))
    values = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None] + 5, (4, 4, 4)).copy()
    assert regrid(values, source, target)[:, 1, 1].tolist() == [5, 5, 5, 6, 7, 8, 8, 8]
    assert coverage(source, target) == pytest.approx(0.5, abs=1e-9)
    assert turned(values, source, target) is None


def test_a_shift_by_whole_voxels_is_no_turn():
    """Same shape and directions, one voxel aside: values must move."""
    values = noise((4, 4, 4))
    source = Geometry((4, 4, 4), affine_of(np.eye(3), (1, 1, 1), (1, 0, 0)))
    target = Geometry((4, 4, 4), np.eye(4))
    assert turned(values, source, target) is None
    np.testing.assert_array_equal(regrid(values, source, target)[1:], values[:-1])


@pytest.mark.parametrize(
    ("shift", "said"), [(300, "covers 0 % of the volume of a.nii; their centres lie 300 mm apart"), (6, "covers 40 %")]
)
def test_another_place_is_refused(tmp_path, shift, said):
    moved = affine_of(np.eye(3), (1, 1, 1), (shift, 0, 0))
    first = save(tmp_path / "a.nii", noise((10, 10, 10)), affine_of(np.eye(3), (1, 1, 1), (0, 0, 0)))
    with pytest.raises(UserError, match=rf"b\.nii: {said}"):
        read_case(case_of(first, save(tmp_path / "b.nii", noise((10, 10, 10)), moved)))


def test_a_part_of_the_extent_is_told(tmp_path):
    first = save(tmp_path / "a.nii", noise((10, 10, 10)), affine_of(np.eye(3), (1, 1, 1), (0, 0, 0)))
    slab = save(tmp_path / "b.nii", noise((10, 10, 3)), affine_of(np.eye(3), (1, 1, 2), (0, 0, 0.5)))
    _, _, (note,) = read_case(case_of(first, slab))
    assert "it covers 60 % of it, its border is repeated beyond" in note


def test_channels_along_the_fourth_axis(tmp_path):
    data = noise((5, 6, 7, 3))
    path = save(tmp_path / "a.nii.gz", data, AFFINE)
    array, geometry, _ = read_case(case_of(path, channel_axis=3))
    np.testing.assert_array_equal(array, np.moveaxis(data, 3, 0))
    picked, _, _ = read_case(case_of(path, channel_axis=3, picks=(2, 0)))
    np.testing.assert_array_equal(picked, np.moveaxis(data, 3, 0)[[2, 0]])
    assert geometry.shape == image_geometry(case_of(path, channel_axis=3)).shape == (5, 6, 7)


# Notes


def test_headers_that_contradict_themselves_and_odd_voxels_are_noted(tmp_path):
    data = noise((5, 6, 7))
    data[0, 0, :3] = [np.nan, np.inf, -np.inf]
    path = save(tmp_path / "a.nii", data, AFFINE, qform=affine_of(rotation(1), (1.0, 1.5, 3.0), (12.5, -20.25, 7.125)))
    array, _, notes = read_case(case_of(path))
    assert np.isnan(array[0, 0, 0, 0])
    assert len(notes) == 2
    assert "sform and qform lie up to 2 mm apart" in notes[0]
    assert notes[1] == f"{path}: 3 voxels are NaN or infinite; the mean of the others stands for them"


def test_threads_do_not_take_each_others_notes(tmp_path):
    odd = affine_of(rotation(1), (1.0, 1.5, 3.0), (12.5, -20.25, 7.125))
    cases = [
        case_of(save(tmp_path / f"{n}.nii.gz", noise((20, 20, 20)), AFFINE, qform=odd if n % 3 == 0 else None))
        for n in range(24)
    ]
    with ThreadPoolExecutor(8) as pool:
        notes = [found for _, _, found in pool.map(read_case, cases)]
    assert [len(found) for found in notes] == [int(n % 3 == 0) for n in range(24)]
    assert all(str(cases[n].images[0]) in found[0] for n, found in enumerate(notes) if found)


def test_a_budget_is_kept(tmp_path):
    with pytest.raises(UserError, match="more than the limit"):
        read_case(case_of(save(tmp_path / "a.nii", noise((5, 6, 7)), AFFINE)), budget=500)


# Labels


def labelled(tmp_path, values, affine=AFFINE):
    image = save(tmp_path / "a.nii", noise((5, 6, 7)), AFFINE)
    return case_of(image, label=save(tmp_path / "l.nii.gz", values, affine))


def test_labels_become_class_indices(tmp_path):
    values = np.random.default_rng(0).choice([0, 1, 4, 9], (5, 6, 7))
    expected = np.choose(np.searchsorted([0, 1, 4, 9], values), [0, 1, 2, IGNORE])
    for dtype in (np.uint8, np.int16, np.float32):
        indices = read_case_label(labelled(tmp_path, values.astype(dtype)), LABELS)
        np.testing.assert_array_equal(indices, expected)
        assert indices.dtype == np.uint8
    nearly = read_case_label(labelled(tmp_path, values * np.float32(0.99999997)), LABELS)
    np.testing.assert_array_equal(nearly, expected)


def test_a_label_on_another_grid_is_refused(tmp_path):
    values = np.zeros((5, 6, 7), np.uint8)
    moved = AFFINE.copy()
    moved[0, 3] += 2
    with pytest.raises(UserError, match=r"l\.nii\.gz: the label lies up to 2 mm away from its image a\.nii"):
        read_case_label(labelled(tmp_path, values, moved), LABELS)
    with pytest.raises(UserError, match=r"the label has 5 x 6 x 8 voxels, its image a\.nii 5 x 6 x 7"):
        read_case_label(labelled(tmp_path, np.zeros((5, 6, 8), np.uint8)), LABELS)
    moved[0, 3] = AFFINE[0, 3] + 5e-4
    assert not read_case_label(labelled(tmp_path, values, moved), LABELS).any()


def test_unknown_values_and_images_for_labels_are_named(tmp_path):
    values = np.zeros((5, 6, 7), np.uint8)
    values[0, 0, :2] = 3
    with pytest.raises(UserError, match=r"l\.nii\.gz: .*the value 3 \(2 "):
        read_case_label(labelled(tmp_path, values), LABELS)
    with pytest.raises(UserError, match=r"hold values that are no labels"):
        read_case_label(labelled(tmp_path, noise((5, 6, 7))), LABELS)
    with pytest.raises(UserError, match="has no label volume"):
        read_case_label(case_of(tmp_path / "a.nii"), LABELS)


# The phantom, and volumes of patients


def test_the_phantom_is_drawn():
    cases = find_training_cases("phantom", channels=["t1c"])
    assert len(cases) >= 50
    assert len({case.group for case in cases}) == len(cases)
    array, geometry, notes = read_case(cases[1])
    indices = read_case_label(cases[1], Labels.from_config({"background": 0, "meningioma": 1}), geometry)
    assert array.shape == (1, *geometry.shape) == (1, *indices.shape)
    assert notes == []


def test_hippocampus_as_published(real_data):
    cases = find_training_cases(real_data / "hippocampus", channels=["t1"])
    assert len(cases) == 120
    labels = Labels.from_config({"background": 0, "anterior": 1, "posterior": 2})
    for case in cases:
        array, geometry, notes = read_case(case)
        indices = read_case_label(case, labels, geometry)
        assert array.shape == (1, *indices.shape)
        assert set(np.unique(indices)) == {0, 1, 2}
        assert notes == []


@pytest.mark.slow  # 3 volumes of 9 million voxels
def test_brats_as_published(real_data):
    layout = {
        "flair": "{case}/Flair_*.nii.gz",
        "t1c": "{case}/T1c_*.nii.gz",
        "label": "{case}/OTMultiClass.nii.gz",
    }
    (case,) = find_training_cases(real_data / "brats2015_examples", layout, ["t1c", "flair"])
    assert case.name == "brats_2013_pat0004_1"
    assert [path.name.split("_")[0] for path in case.images] == ["T1c", "Flair"]
    array, geometry, notes = read_case(case)
    labels = Labels.from_config({"background": 0, "necrosis": 1, "oedema": 2, "rest": 3, "enhancing": 4})
    indices = read_case_label(case, labels, geometry)
    assert array.shape == (2, 240, 240, 155)
    assert geometry.orientation == "LPS"
    assert np.bincount(indices.ravel()).tolist() == [8807326, 12956, 45203, 44699, 17816]
    assert notes == []
