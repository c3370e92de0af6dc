from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data.augment import AUGMENT, build_augmenter
from visattn.errors import UserError
from visattn.labels import Labels

LABELS = Labels.from_config({"background": 0, "left": 1, "right": 2})
BINARY = Labels.from_config({"background": 0, "polyp": 255})
EVERYTHING = [{"name": name, "p": 1.0} for name in AUGMENT]
GEOMETRY = [
    {"name": "affine", "rotate": 180, "p": 1.0},
    "flip_horizontal",
    "flip_vertical",
    {"name": "elastic", "p": 1.0},
]


def rng(seed=0):
    return np.random.default_rng(seed)


def blobs(seed=0, shape=(90, 130)):
    """A smooth mask of two values, and the image that shows it."""
    field = cv2.GaussianBlur(rng(seed).standard_normal(shape), (0, 0), 9)
    mask = (field > 0).astype(np.uint8)
    return np.dstack([mask * 255] * 3), mask


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_image_and_mask_move_together(seed):
    image, mask = blobs(seed)
    moved, target = build_augmenter(GEOMETRY, BINARY)(image, mask, rng(seed))
    outline = cv2.dilate(cv2.Canny(target * 255, 50, 150), np.ones((5, 5)))
    disagreement = ((moved[..., 0] > 127) != (target == 1)) & (outline == 0)
    assert disagreement.mean() < 0.002
    assert not np.array_equal(target, mask)


@pytest.mark.parametrize(("name", "axis"), [("flip_horizontal", 1), ("flip_vertical", 0)])
def test_flips_are_exact(name, axis):
    image, mask = rng().integers(0, 256, (7, 12, 3), dtype=np.uint8), rng(1).integers(0, 3, (7, 12), dtype=np.uint8)
    flipped, target = build_augmenter([{"name": name, "p": 1}], LABELS)(image, mask, rng())
    assert np.array_equal(flipped, np.flip(image, axis))
    assert np.array_equal(target, np.flip(mask, axis))
    both = build_augmenter([{"name": "flip_horizontal", "p": 1}, {"name": "flip_vertical", "p": 1}], LABELS)
    assert np.array_equal(both(image, mask, rng())[1], mask[::-1, ::-1])


def test_flip_swaps_the_labels_that_have_a_side():
    image, mask = np.zeros((1, 4, 3), np.uint8), np.array([[1, 0, 2, 255]], np.uint8)
    swap = {"name": "flip_horizontal", "p": 1, "swap_labels": [["left", "right"]]}
    assert build_augmenter([swap], LABELS)(image, mask, rng())[1].tolist() == [[255, 1, 0, 2]]
    assert build_augmenter([swap, swap], LABELS)(image, mask, rng())[1].tolist() == mask.tolist()


def affine(**values):
    return build_augmenter([{"name": "affine", "rotate": 0, "scale": [1, 1], "shift": 0, "p": 1, **values}], BINARY)


def test_zoom_keeps_the_centre_and_multiplies_areas():
    image, mask = np.zeros((80, 120, 3), np.uint8), np.zeros((80, 120), np.uint8)
    mask[35:45, 50:70] = 1
    for zoom in (0.5, 2.0):
        _, target = affine(scale=[zoom, zoom])(image, mask, rng())
        rows, columns = np.nonzero(target)
        assert target.sum() == pytest.approx(200 * zoom**2, rel=0.15)
        assert (rows.mean(), columns.mean()) == pytest.approx((39.5, 59.5), abs=0.6)


def test_rotation_reaches_its_limits_and_no_further():
    image, mask = np.zeros((101, 101, 3), np.uint8), np.zeros((101, 101), np.uint8)
    mask[50, 80] = 1
    mask = cv2.dilate(mask, np.ones((3, 3)))
    angles = []
    for seed in range(200):
        rows, columns = np.nonzero(affine(rotate=40)(image, mask, rng(seed))[1])
        angles.append(np.degrees(np.arctan2(50 - rows.mean(), columns.mean() - 50)))
    assert -42 < min(angles) < -35
    assert 35 < max(angles) < 42


@pytest.mark.parametrize("first", ["flip_horizontal", "flip_vertical"])
def test_fused_geometry_equals_one_step_after_another(first):
    steps = [{"name": first, "p": 1}, {"name": "affine", "rotate": 90, "shift": 0.3, "p": 1}]
    image, mask = blobs()
    fused = build_augmenter(steps, BINARY)(image, mask, rng(4))
    generator, stepwise = rng(4), (image, mask)
    for step in steps:
        stepwise = build_augmenter([step], BINARY)(*stepwise, generator)
    assert (fused[1] != stepwise[1]).mean() < 0.01
    assert np.abs(fused[0].astype(int) - stepwise[0]).mean() < 2


def test_elastic_bends_the_result_of_the_affine_map():
    image, mask = blobs()
    still = {"name": "elastic", "strength": 0, "p": 1}
    turn = {"name": "affine", "rotate": 90, "shift": 0.3, "p": 1}
    plain = build_augmenter([turn], BINARY)(image, mask, rng(4))
    bent = build_augmenter([turn, still], BINARY)(image, mask, rng(4))
    assert (plain[1] != bent[1]).mean() < 0.01
    strong = {"name": "elastic", "strength": 0.05, "p": 1}
    assert (plain[1] != build_augmenter([turn, strong], BINARY)(image, mask, rng(4))[1]).mean() > 0.01


def test_what_enters_from_outside_is_black_background():
    image, mask = np.full((40, 60, 3), 200, np.uint8), np.full((40, 60), 2, np.uint8)
    moved, target = affine(scale=[0.5, 0.5])(image, mask, rng())
    assert np.array_equal(target == 0, moved[..., 0] < 100)
    assert (target == 0).mean() == pytest.approx(0.75, abs=0.05)


def test_ignored_pixels_stay_ignored():
    image, mask = blobs()
    target = build_augmenter(GEOMETRY, BINARY)(image, mask * 255, rng())[1]
    assert set(np.unique(target)) == {0, 255}


@pytest.mark.parametrize("name", ["colour", "blur", "noise", "cutout"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixel_transforms_change_the_image_and_leave_the_mask(name, channels):
    image, mask = blobs()
    image = np.ascontiguousarray((image // 2 + 40)[..., :channels])
    changed, target = build_augmenter([{"name": name, "p": 1}], BINARY)(image, mask, rng())
    assert changed.shape == image.shape
    assert changed.dtype == np.uint8
    assert not np.array_equal(changed, image)
    assert np.array_equal(target, mask)


def colour(image, seed=0, **values):
    off = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    return build_augmenter([{"name": "colour", "p": 1, **off, **values}], BINARY)(
        image, np.zeros(image.shape[:2], np.uint8), rng(seed)
    )[0]


def test_colour_parts():
    image = rng().integers(60, 160, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(colour(image), image)
    for seed in range(20):
        ratio = colour(image, seed, brightness=0.3).mean() / image.mean()
        assert 0.69 < ratio < 1.31
        contrasted = colour(image, seed, contrast=0.4)
        assert contrasted.mean() == pytest.approx(image.mean(), abs=1.5)
        grey = np.repeat(image[..., :1], 3, axis=2)
        assert np.abs(colour(grey, seed, saturation=0.5, hue=0.2).astype(int) - grey).max() <= 1
    turned = colour(np.full((1, 1, 3), (200, 100, 50), np.uint8), 0, hue=0.5)[0, 0].astype(int)
    assert abs(turned.sum() - 350) <= 3
    assert len({colour(image, seed, hue=0.1).tobytes() for seed in range(5)}) == 5


def test_hue_of_a_third_turn_permutes_the_channels():
    from visattn.data.augment import _hue

    assert np.allclose(_hue(2 * np.pi / 3), [[0, 0, 1], [1, 0, 0], [0, 1, 0]], atol=1e-12)


def test_probability_is_a_probability():
    image, mask = np.zeros((8, 8, 3), np.uint8), rng().integers(0, 2, (8, 8), dtype=np.uint8)
    for p in (0, 0.3, 1):
        augmenter = build_augmenter([{"name": "flip_horizontal", "p": p}], BINARY)
        changed = [not np.array_equal(augmenter(image, mask, rng(seed))[1], mask) for seed in range(300)]
        assert np.mean(changed) == pytest.approx(p, abs=0.09)


def test_nothing_asked_nothing_changed_and_inputs_stay():
    image, mask = blobs()
    before = image.copy(), mask.copy()
    same, target = build_augmenter(None, BINARY)(image, mask, rng())
    assert np.array_equal(same, image)
    assert np.array_equal(target, mask)
    build_augmenter(EVERYTHING, BINARY)(image, mask, rng())
    assert np.array_equal(image, before[0])
    assert np.array_equal(mask, before[1])


def test_a_draw_is_a_function_of_its_seed():
    image, mask = blobs()
    augmenter, other = build_augmenter(EVERYTHING, BINARY), build_augmenter(EVERYTHING, BINARY)
    first = augmenter(image, mask, rng((0, 1, 2)))
    augmenter(image, mask, rng(99))  # what was drawn between must not matter
    again = augmenter(image, mask, rng((0, 1, 2)))
    fresh = other(image, mask, rng((0, 1, 2)))
    for a, b, c in zip(first, again, fresh, strict=True):
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    assert not np.array_equal(first[0], augmenter(image, mask, rng((0, 1, 3)))[0])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("flip_horizontl", "Did you mean 'flip_horizontal'"),
        ({"name": "affine", "rotat": 3}, "Did you mean 'rotate'"),
        ({"rotate": 3}, "name' is missing|needs a name"),
        (7, "name' is missing|needs a name"),
        ({"name": "affine", "scale": 0.8}, "affine.scale"),
        ({"name": "affine", "scale": [1.2, 0.8]}, "smaller number first"),
        ({"name": "affine", "scale": [0, 1]}, "affine.scale"),
        ({"name": "affine", "rotate": "90"}, "affine.rotate"),
        ({"name": "affine", "rotate": 270}, "0..180"),
        ({"name": "affine", "p": 1.5}, "affine.p"),
        ({"name": "cutout", "holes": 2.5}, "cutout.holes"),
        ({"name": "elastic", "cells": 2.5}, "elastic.cells"),
        ({"name": "flip_horizontal", "swap_labels": [["left", "rigth"]]}, "Did you mean 'right'"),
        ({"name": "flip_horizontal", "swap_labels": ["left", "right"]}, "pairs"),
        ({"name": "flip_horizontal", "swap_labels": 3}, "pairs"),
    ],
)
def test_mistakes_are_explained(entry, message):
    with pytest.raises(UserError, match=message):
        build_augmenter([entry], LABELS)


def test_documentation_lists_every_augmentation_and_argument():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    for name, kind in AUGMENT.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line)
        for entry in fields(kind):
            assert entry.name == "p" or f"`{entry.name}`" in row
