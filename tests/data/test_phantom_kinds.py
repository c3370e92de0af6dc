import json

import cv2
import numpy as np
import pytest
from scipy import ndimage

from visattn.cli import main
from visattn.data import nifti
from visattn.data.cases import CaseReader, check_cases, find_cases
from visattn.data.images import read_image, read_mask
from visattn.data.phantom import SCENES, phantom_images
from visattn.data.phantom_hippocampus import phantom_hippocampus
from visattn.data.phantom_volumes import DRAWN, WRITERS
from visattn.data.phantoms import IMAGE_KINDS, PHANTOM_SEED, VOLUME_KINDS, drawn_name, kind_of, phantom_kind
from visattn.data.volumes import find_training_cases, read_case, read_case_label
from visattn.errors import UserError
from visattn.labels import Labels

NEW = [kind for kind in IMAGE_KINDS if kind != "polyp"]


def test_every_kind_that_is_named_is_drawn():
    assert tuple(SCENES) == IMAGE_KINDS
    assert tuple(DRAWN) == tuple(WRITERS) == VOLUME_KINDS
    for kind in (*IMAGE_KINDS, *VOLUME_KINDS):
        assert kind_of(drawn_name(kind, 7)) == kind_of(f"phantom:{kind}/{drawn_name(kind, 7)}") == kind
    assert [drawn_name(kind, 3) for kind in ("polyp", "head")] == ["phantom_0003", "head_0003"]  # as in old runs


@pytest.mark.parametrize(
    ("root", "kind"), [("phantom", "polyp"), ("phantom:skin", "skin"), ("phantoms", None), ("./phantom", None)]
)
def test_what_a_root_means(root, kind):
    assert phantom_kind(root, IMAGE_KINDS) == kind


def test_a_kind_of_the_other_dimension_or_none_is_refused():
    with pytest.raises(UserError, match=r"unknown phantom 'vesels'. Did you mean 'vessels'?"):
        find_cases(["phantom:vesels"])
    with pytest.raises(UserError, match="Known: head, hippocampus"):
        find_training_cases("phantom:nuclei")
    with pytest.raises(UserError, match="twice"):
        find_cases(["phantom", "phantom:polyp"])


@pytest.mark.parametrize("kind", NEW)
def test_pictures_are_functions_of_seed_and_index_with_masks_neither_empty_nor_full(kind):
    short, long, other = (list(phantom_images(*numbers, (72, 88), kind)) for numbers in ((2, 1), (12, 1), (2, 2)))
    for (image, mask, name), (again, mask_again, name_again) in zip(short, long, strict=False):
        assert np.array_equal(image, again)
        assert np.array_equal(mask, mask_again)
        assert name == name_again
    assert not np.array_equal(short[0][0], other[0][0])
    for image, mask, _ in long:
        assert (image.shape, mask.shape) == ((72, 88, 3), (72, 88))
        assert image.dtype == mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}
        assert 0.004 < (mask > 0).mean() < 0.7


def test_lesions_lie_in_the_pictures_as_their_masks_say():
    """Skin: darker than the rest; vessels: thin, connected, darker than what surrounds them; nuclei: many parts."""
    for image, mask, _ in phantom_images(8, 3, kind="skin"):
        lit = image.sum(-1) > 90
        assert image[(mask > 0) & lit].mean() < image[(mask == 0) & lit].mean() - 4
    for image, mask, _ in phantom_images(4, 3, kind="vessels"):
        inside = mask > 0
        near = (cv2.dilate(mask, np.ones((7, 7))) > 0) & ~inside & (image[..., 0] > 60)
        assert image[inside, 1].mean() < image[near, 1].mean() - 5  # the green channel, as ophthalmologists look at
        assert ndimage.distance_transform_edt(inside).max() < 8
        sizes = np.bincount(ndimage.label(inside, np.ones((3, 3)))[0].ravel())[1:]
        assert sizes.max() > 0.7 * sizes.sum()
    parts = [ndimage.label(mask)[1] for _, mask, _ in phantom_images(6, 3, kind="nuclei")]
    assert np.median(parts) > 5


def test_a_kind_is_a_root_and_is_written(tmp_path):
    cases = find_cases(["phantom:nuclei"])
    assert len(cases) == 200
    labels = Labels.from_config({"background": 0, "nucleus": 255})
    first = next(phantom_images(1, PHANTOM_SEED, kind="nuclei"))
    image, classes = CaseReader(labels, 3)(cases[0])
    assert np.array_equal(image, first[0])
    assert np.array_equal(classes * 255, first[1])
    checked, problems = check_cases(cases[:2], CaseReader(labels, 1), None)
    assert len({one.digest for one in checked}) == 2
    assert problems == []

    assert main(["phantom", str(tmp_path), "--kind", "skin", "--count", "2", "--seed", "9"]) == 0
    for case, (image, mask, name) in zip(find_cases([str(tmp_path)]), phantom_images(2, 9, kind="skin"), strict=True):
        assert case.name == name
        assert np.array_equal(read_image(case.image), image)
        assert np.array_equal(read_mask(case.mask), mask)


def test_hippocampi_have_their_front_in_front_whatever_the_axes():
    orientations = set()
    for index in range(12):
        image, labels, geometry = phantom_hippocampus(index, 5)
        assert image.shape == (1, *labels.shape) == (1, *geometry.shape)
        assert np.array_equal(image, np.rint(image))
        orientations.add(geometry.orientation)
        front, back = (geometry.affine[1, :3] @ np.argwhere(labels == label).mean(axis=0) for label in (1, 2))
        assert front > back + 8  # mm
        for label in (1, 2):
            assert 300 < (labels == label).sum() < 4000
            assert ndimage.label(labels == label)[1] <= 3
        again = phantom_hippocampus(index, 5)
        assert np.array_equal(image, again[0])
    assert len(orientations) > 3


def test_hippocampi_are_a_root_and_are_written(tmp_path):
    cases = find_training_cases("phantom:hippocampus", channels=["t1"])
    assert len(cases) == 100
    array, geometry, notes = read_case(cases[4])
    labels = Labels.from_config({"background": 0, "anterior": 1, "posterior": 2})
    indices = read_case_label(cases[4], labels, geometry)
    image, values, own = phantom_hippocampus(4, PHANTOM_SEED)
    assert np.array_equal(array, image)
    assert np.array_equal(indices, values)
    assert own.same_grid(geometry)
    assert notes == []

    assert main(["phantom", str(tmp_path / "h"), "--kind", "hippocampus", "--count", "2", "--seed", "5"]) == 0
    assert json.loads((tmp_path / "h/dataset.json").read_text())["labels"] == labels.to_config()["labels"]
    written = find_training_cases(str(tmp_path / "h"))
    image, values, own = phantom_hippocampus(1, 5)
    assert np.array_equal(read_case(written[1])[0], image)
    assert np.array_equal(nifti.read_labels(tmp_path / "h/labelsTr/hippocampus_0001.nii.gz")[0], values)
