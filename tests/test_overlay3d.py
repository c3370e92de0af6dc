from itertools import permutations, product

import numpy as np
import pytest

from visattn.data.geometry import Geometry
from visattn.labels import IGNORE, Labels
from visattn.overlay3d import draw_planes, montage, planes

BINARY = Labels.from_config({"background": 0, "tumour": 1})
# right, front and top of the head are bright, in this order of brightness; sides in mm differ along every axis
ZOOMS = (1.0, 1.5, 4.0)
SIZES = (60, 48, 20)


def head():
    """A volume in RAS with a mark at its right, front and top, and a lesion."""
    image = np.zeros(SIZES, np.float32)
    image[10:50, 10:40, 4:16] = 40
    lesion = np.zeros(SIZES, np.uint8)
    lesion[40:47, 30:37, 11:14] = 1  # right, front, top; odd, so that it has a middle voxel
    lesion[12:14, 12:14, 5] = 2  # a smaller one
    image[43, :, 12] += 50
    return image, lesion


def turned(array, zooms, order, flips):
    """The array with other axes, and the geometry that says so."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, source in enumerate(order):
        affine[source, axis] = -zooms[source] if flips[axis] else zooms[source]
        if flips[axis]:
            affine[source, 3] = zooms[source] * (array.shape[source] - 1)
    result = array.transpose(order)
    result = result[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    return np.ascontiguousarray(result), Geometry(result.shape, affine)


def test_planes_are_equal_for_all_48_orientations_of_a_file():
    image, lesion = head()
    expected = planes(image, turned(image, ZOOMS, (0, 1, 2), (0, 0, 0))[1], lesion, lesion)
    for order in permutations(range(3)):
        for flips in product((0, 1), repeat=3):
            volume, geometry = turned(image, ZOOMS, order, flips)
            mask, _ = turned(lesion, ZOOMS, order, flips)
            for view, other in zip(planes(volume, geometry, mask, mask), expected, strict=True):
                np.testing.assert_array_equal(view.image, other.image)
                np.testing.assert_array_equal(view.truth, other.truth)
                assert (view.name, view.letters, view.mm) == (other.name, other.letters, other.mm)


def test_planes_stand_upright_with_the_right_on_the_left():
    image, lesion = head()
    axial, coronal, sagittal = planes(image, turned(image, ZOOMS, (0, 1, 2), (0, 0, 0))[1], lesion)
    assert [view.letters for view in (axial, coronal, sagittal)] == ["RLAP", "RLSI", "APSI"]
    for view in (axial, coronal, sagittal):  # the lesion is to the right, to the front and up
        rows, columns = np.nonzero(view.truth)
        assert rows.mean() < view.truth.shape[0] / 2
        assert columns.mean() < view.truth.shape[1] / 2
        assert set(np.unique(view.truth)) == {0, 1}, "the smaller lesion is not in these planes"


def test_a_pixel_has_the_same_size_in_every_direction():
    image, lesion = head()
    views = planes(image, turned(image, ZOOMS, (0, 1, 2), (0, 0, 0))[1], lesion)
    extents = np.array(SIZES) * ZOOMS  # 60, 72, 80 mm
    for view, (rows, columns), (height, width) in zip(
        views, [(1, 0), (2, 0), (2, 1)], [(10.5, 7), (12, 7), (12, 10.5)], strict=True
    ):
        assert np.abs(np.array(view.image.shape[:2]) * view.mm - extents[[rows, columns]]).max() <= view.mm
        drawn = np.argwhere(view.truth)
        size = (drawn.max(axis=0) - drawn.min(axis=0) + 1) * view.mm
        np.testing.assert_allclose(size, (height, width), atol=view.mm)


def test_the_planes_go_through_the_largest_lesion_of_the_truth_then_of_the_prediction_then_the_middle():
    image = np.zeros(SIZES, np.float32)
    geometry = turned(image, ZOOMS, (0, 1, 2), (0, 0, 0))[1]
    marks = np.zeros((3, *SIZES), np.float32)
    marks[0][43, 33, 12] = marks[1][12, 12, 5] = marks[2][30, 24, 10] = 1
    truth, prediction, ignored = np.zeros((3, *SIZES), np.uint8)
    truth[42:45, 32:35, 11:14] = 1
    prediction[11:14, 11:14, 4:7] = 1
    ignored[:50] = IGNORE  # larger, but no lesion
    nothing = np.zeros(SIZES, np.uint8)
    for mark, masks in zip(marks, [(truth, prediction), (ignored, prediction), (nothing, None)], strict=True):
        shown = planes(mark, geometry, *masks)
        assert all(view.image.max() > 100 for view in shown), "all three planes hold the mark"


def test_a_ring_is_cut_where_it_is():
    image = np.zeros((40, 40, 5), np.float32)
    y, x = np.mgrid[:40, :40]
    ring = np.abs(np.hypot(y - 20, x - 20) - 15) < 1.5
    truth = np.repeat(ring[..., None], 5, axis=2).astype(np.uint8)
    for view in planes(image, Geometry((40, 40, 5), np.eye(4)), truth):
        assert view.truth.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 7.0])
def test_values_that_cannot_be_shown_leave_a_picture(value):
    image = np.full((8, 9, 10), value, np.float32)
    for view in planes(image, Geometry((8, 9, 10), np.eye(4))):
        assert view.image.dtype == np.uint8
        assert view.image.shape[2] == 3
    image[4:] = np.linspace(-1, 1, 360).reshape(4, 9, 10)
    assert planes(image, Geometry((8, 9, 10), np.eye(4)))[0].image.std() > 10, "what can be shown is"


def test_large_and_small_volumes_give_pictures_of_bearable_size():
    for shape in [(3, 3, 3), (1, 1, 1), (1, 200, 200), (1500, 20, 20)]:
        for view in planes(None, Geometry(shape, np.diag([0.5, 0.5, 5, 1]))):
            assert max(view.image.shape[:2]) <= 640
            assert min(view.image.shape[:2]) >= 1


def test_nothing_is_written_on_a_plane_and_the_bar_has_its_length():
    image, lesion = head()
    geometry = turned(image, ZOOMS, (0, 1, 2), (0, 0, 0))[1]
    view = planes(None, geometry, lesion)[0]
    ground, truth, prediction = montage(None, geometry, lesion)
    assert prediction is None
    assert truth.shape == ground.shape[:2]
    grey = (ground == 72).all(axis=-1)
    assert grey.sum() == sum(one.image.shape[0] * one.image.shape[1] for one in planes(None, geometry, lesion))
    white = (ground == 240).all(axis=-1)
    lengths = [len(run) for row in white for run in "".join("x" if p else " " for p in row).split()]
    assert round(max(lengths) * view.mm) == 20, "a third of 60 mm"
    assert not truth[white].any()


def test_draw_planes_outlines_truth_and_prediction():
    image, lesion = head()
    lesion[lesion == 2] = 0
    geometry = turned(image, ZOOMS, (0, 1, 2), (0, 0, 0))[1]
    moved = np.roll(lesion, 4, axis=0)
    picture = draw_planes(image, geometry, moved, BINARY, lesion, "Dice 0.5")
    alone = draw_planes(image, geometry, moved, BINARY)
    cyan = (np.abs(picture.astype(int) - [0, 229, 255]).max(axis=-1) < 30).sum()
    assert cyan > 200
    assert picture.ndim == 3
    assert not np.array_equal(picture, alone)


@pytest.mark.parametrize("value", [-6.25, 0.0])
def test_a_constant_margin_is_left_out_of_a_montage_but_no_lesion_is(value):
    shape = (160, 120, 100)
    image = np.full(shape, value, np.float32)
    image[50:90, 40:80, 30:60] = np.random.default_rng(0).random((40, 40, 30))
    geometry = Geometry(shape, np.diag([-1, 1, 1.5, 1]))
    whole, small = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    small[60:70, 50:60, 40:50] = 1
    whole[2:6, 50:70, 40:50] = 1  # in the margin
    ground, _, shown = montage(image, geometry, None, small)
    inner = (slice(42, 98), slice(34, 86), slice(25, 65))  # a twentieth of each side beyond the head
    views = planes(image[inner], Geometry((56, 52, 40), geometry.affine), None, small[inner])
    assert shown.sum() == sum(int(view.prediction.sum()) for view in views)
    _, _, shown = montage(image, geometry, None, whole)
    assert (shown > 0).any()
    ignored = np.full(shape, IGNORE, np.uint8)
    assert montage(image, geometry, ignored, small)[0].shape == ground.shape
    constant = montage(np.full(shape, value, np.float32), geometry, None, np.zeros(shape, np.uint8))[0]
    assert constant.shape[1] > 3 * 160
