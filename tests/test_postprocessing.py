import numpy as np
import pytest
from scipy import ndimage

from visattn.components import find_components
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.postprocessing import PostProcessing

CLASSES = Labels.from_config({"background": 0, "rim": 3, "core": 7})
REGIONS = Labels.from_config({"background": 0, "rim": 3, "core": 7}, {"whole": ["rim", "core"], "inner": ["core"]})
ALL = np.ones((3, 3, 3))


def done(indices, *steps, labels=CLASSES, voxel_ml=0.5, slab=10**6):
    result = indices.copy()
    PostProcessing.from_config(list(steps), labels, indices.ndim).apply(result, voxel_ml, slab)
    return result


def noise(seed, shape=(9, 11, 13), share=0.15, classes=3):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < share, rng.integers(1, classes, shape), 0).astype(np.uint8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("faces_only", [False, True])
@pytest.mark.parametrize("slab", [1, 3 * 99, 10**6])
def test_components_do_not_depend_on_slabs(seed, faces_only, slab):
    mask = noise(seed, share=0.3) > 0
    structure = ndimage.generate_binary_structure(3, 1 if faces_only else 3)
    marks, count = ndimage.label(mask, structure)
    inner = np.zeros(mask.shape, bool)
    inner[1:-1, 1:-1, 1:-1] = True
    found = find_components(lambda part: mask[:, :, part], mask.shape, faces_only, slab)
    expected = sorted((int((marks == n).sum()), bool((marks[~inner] == n).any())) for n in range(1, count + 1))
    assert sorted(zip(found.sizes.tolist(), found.at_border.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(found.sums, np.argwhere(mask).sum(axis=0))
    # Each component, put together from the slabs, is one of scipy's.
    for number in range(len(found.sizes)):
        own = np.zeros(mask.shape, bool)
        for held in found.held:
            if held.box is not None:
                wanted = np.arange(len(found.sizes)) == number
                own[:, :, held.part][held.box] = found.chosen(mask[:, :, held.part][held.box], held, wanted)
        assert own.sum() == found.sizes[number]
        assert len(np.unique(marks[own])) == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("slab", [1, 10**6])
def test_the_largest_part_of_each_label_stays(seed, slab):
    before = noise(seed)
    after = done(before, "keep_largest", slab=slab)
    for index in (1, 2):
        marks, _count = ndimage.label(before == index, ALL)
        sizes = np.bincount(marks.ravel())[1:]
        assert (after == index).sum() == sizes.max() < sizes.sum()
        assert ndimage.label(after == index, ALL)[1] == 1
        assert not ((after == index) & (before != index)).any()


def test_only_the_labels_that_are_named():
    before = noise(1)
    after = done(before, {"name": "keep_largest", "labels": ["core"]})
    assert np.array_equal(after == 1, before == 1)
    assert (after == 2).sum() < (before == 2).sum()


def test_labels_together_are_one_thing():
    before = np.zeros((8, 5, 5), np.uint8)
    before[0:2, 2, 2], before[2, 2, 2], before[5:8, 2, 2] = 1, 2, 1  # 2 + 1 voxels in a row, and 3 alone
    together = done(before, {"name": "remove_small", "voxels": 3, "together": True})
    assert np.array_equal(together, before)
    apart = done(before, {"name": "remove_small", "voxels": 3})
    assert (apart > 0).sum() == 3
    assert (apart[5:8] == 1).sum() == 3


def test_small_is_measured_in_ml_and_a_part_of_just_that_volume_stays():
    before = np.zeros((10, 4, 4), np.uint8)
    before[0, 0, 0:2], before[4, 0, 0:3] = 1, 1
    for voxel_ml, left in ((0.1, 3), (0.1001 * 3 / 2, 5), (0.05, 0)):
        after = done(before, {"name": "remove_small", "ml": 0.3}, voxel_ml=voxel_ml)
        assert (after > 0).sum() == left


def test_diagonal_neighbours_are_one_part():
    before = np.zeros((6, 6, 6), np.uint8)
    before[range(4), range(4), range(4)] = 1
    assert np.array_equal(done(before, {"name": "remove_small", "voxels": 4}), before)


@pytest.mark.parametrize("slab", [1, 10**6])
def test_holes_are_filled_where_they_are_closed_and_background(slab):
    before = np.zeros((9, 9, 9), np.uint8)
    before[1:8, 1:8, 1:8] = 1
    before[3:6, 3:6, 3:6] = 0  # closed
    before[4, 4, 4] = 2  # another label stays
    before[2, 2, 0:4] = 0  # a tunnel from outside, which the closed hole does not meet
    after = done(before, "fill_holes", slab=slab)
    expected = before.copy()
    expected[3:6, 3:6, 3:6] = 1
    expected[4, 4, 4] = 2
    assert np.array_equal(after, expected)


@pytest.mark.parametrize("axis", range(3))
def test_a_single_slice_is_an_image(axis):
    ring = np.zeros((7, 7), np.uint8)
    ring[1:6, 1:6] = 1
    ring[3, 3] = 0
    full = ring.copy()
    full[3, 3] = 1
    assert np.array_equal(done(ring, "fill_holes"), full)
    assert np.array_equal(done(np.expand_dims(ring, axis), "fill_holes"), np.expand_dims(full, axis))
    thick = np.zeros((7, 7, 5), np.uint8)  # of more slices: open above and below
    thick[:, :, 2] = ring
    assert np.array_equal(done(thick, "fill_holes"), thick)


def test_an_image_is_changed_in_place():
    image = np.zeros((8, 8), np.uint8)
    image[0, 0], image[3:6, 3:6] = 1, 1
    PostProcessing.from_config(["keep_largest"], CLASSES, 2).apply(image)
    assert image[0, 0] == 0
    assert image.sum() == 9


def test_what_leaves_a_region_leaves_those_within_and_stays_in_those_around():
    before = np.zeros((12, 3, 3), np.uint8)
    before[0:5], before[1:3, 1], before[4, 1] = 1, 2, 2  # whole of 45 voxels, its inner parts of 6 and 3
    before[8:10, 1, 1] = 2  # another whole, all of it inner
    inner = done(before, {"name": "remove_small", "voxels": 4, "labels": ["inner"]}, labels=REGIONS)
    assert (inner[4, 1] == 1).all()
    assert (inner[8:10, 1, 1] == 1).all()
    assert (inner[1:3, 1] == 2).all()
    whole = done(before, {"name": "keep_largest", "labels": ["whole"]}, labels=REGIONS)
    assert not whole[8:].any()
    assert np.array_equal(whole[:5], before[:5])


def test_holes_of_an_inner_region_are_filled_within_the_outer():
    before = np.zeros((7, 7, 7), np.uint8)
    before[1:6, 1:6, 1:6] = 2
    before[3, 3, 3], before[2, 2, 2] = 1, 0
    after = done(before, "fill_holes", labels=REGIONS)
    assert (after[1:6, 1:6, 1:6] == 2).all()
    assert (after > 0).sum() == 125


def test_nothing_and_nothing_there():
    empty = np.zeros((4, 4, 4), np.uint8)
    assert not done(empty, "keep_largest", "fill_holes", {"name": "remove_small", "ml": 1}).any()
    before = noise(0)
    assert np.array_equal(done(before), before)


def test_a_recipe_and_a_checkpoint_say_the_same():
    config = [{"name": "fill_holes"}, {"name": "remove_small", "labels": ["core"], "together": True, "ml": 0.3}]
    assert PostProcessing.from_config(config, CLASSES, 3).to_config() == config
    assert PostProcessing.from_config(["keep_largest"], CLASSES, 3).to_config() == [{"name": "keep_largest"}]
    assert PostProcessing.from_config(None, CLASSES, 3).to_config() == []


@pytest.mark.parametrize(
    ("config", "rank", "message"),
    [
        (["keep_larges"], 3, r"postprocess\[0\].*keep_larges.*Did you mean 'keep_largest'"),
        ([{"labels": ["rim"]}], 3, "the key 'name' is missing"),
        (["fill_holes", {"name": "keep_largest", "label": ["rim"]}], 3, r"postprocess\[1\].*Did you mean 'labels'"),
        ([{"name": "keep_largest", "labels": ["rin"]}], 3, "Did you mean 'rim'"),
        ([{"name": "keep_largest", "labels": ["background"]}], 3, "unknown label"),
        ([{"name": "keep_largest", "labels": "rim"}], 3, "needs a list of names"),
        ([{"name": "remove_small"}], 3, "needs ml, as 0.1, or voxels"),
        ([{"name": "remove_small", "ml": 1, "voxels": 3}], 3, "not both"),
        ([{"name": "remove_small", "ml": -1}], 3, "ml needs a number above 0"),
        ([{"name": "remove_small", "ml": float("nan")}], 3, "ml needs a number above 0"),
        ([{"name": "remove_small", "voxels": 1.5}], 3, "voxels needs a number above 0"),
        ([{"name": "remove_small", "ml": 1}], 2, "ml is for volumes"),
        ([{"name": "keep_largest", "together": "yes"}], 3, "together is true or false"),
        ({"name": "keep_largest"}, 3, "needs a list"),
        ([["keep_largest"]], 3, "needs a name"),
        (["fill_holes"] * 30, 3, "at most 20"),
    ],
)
def test_mistakes(config, rank, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        PostProcessing.from_config(config, CLASSES, rank)
