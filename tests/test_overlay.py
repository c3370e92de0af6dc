import numpy as np
import pytest
from PIL import Image

from visattn.labels import IGNORE, Labels
from visattn.overlay import (
    CLASSES,
    PREDICTION,
    TRUTH,
    draw_overlay,
    encode_png,
    foreground_masks,
    safe_name,
    write_png,
)

BINARY = Labels.from_config({"background": 0, "polyp": 255})


def square(size=(400, 500), box=(100, 100, 300, 300), index=1):
    mask = np.zeros(size, np.uint8)
    mask[box[0] : box[2], box[1] : box[3]] = index
    return mask


def near(picture, colour, tolerance=40):
    return (np.abs(picture.astype(int) - np.array(colour)).max(axis=-1)) <= tolerance


def contrast(one, other):
    def luminance(colour):
        c = np.array(colour) / 255
        c = np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return float(c @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("grey", [0, 120, 255])
def test_both_outlines_are_visible_on_any_ground(grey):
    image = np.full((400, 500, 3), grey, np.uint8)
    truth, prediction = square(), square(box=(120, 150, 350, 360))
    picture = draw_overlay(image, prediction, BINARY, truth)[:400]
    top, left = slice(97, 104), slice(97, 104)
    for rows, columns, colour in ((top, slice(120, 280), TRUTH), (slice(116, 125), slice(160, 350), PREDICTION)):
        strip = picture[rows, columns]
        drawn = near(strip, colour)
        share = drawn.any(axis=0).mean()
        assert share > (0.95 if colour == TRUTH else 0.4), "solid truth, dashed prediction"
        if colour == PREDICTION:
            assert share < 0.85
        dark = (strip.max(axis=-1) < 90).any(axis=0) if grey > 90 else np.array(True)
        assert dark.mean() > 0.4, "a dark casing sets the line off"
    assert near(picture[120:280, left], TRUTH).any(axis=1).mean() > 0.95
    assert (picture[380:, 480:] == grey).all(), "the rest of the image is untouched"
    assert (picture[200, 200] == grey).all(), "and so is the inside"


def test_outlines_that_coincide_are_both_seen():
    image = np.full((400, 500, 3), 120, np.uint8)
    picture = draw_overlay(image, square(), BINARY, square())
    edge = picture[97:104, 110:290]
    assert near(edge, PREDICTION).any(axis=0).mean() > 0.3
    assert near(edge, TRUTH).any(axis=0).mean() > 0.1


def test_colours_of_binary_and_of_neighbouring_classes_differ():
    dark = (20, 20, 24)
    for colour in (TRUTH, PREDICTION, *CLASSES):
        assert contrast(colour, dark) > 4.5
    assert len(set(CLASSES)) == len(CLASSES)


def test_line_width_follows_the_image():
    widths = []
    for scale in (1, 4):
        image = np.full((400 * scale, 500 * scale, 3), 120, np.uint8)
        mask = np.kron(square(), np.ones((scale, scale), np.uint8))
        picture = draw_overlay(image, np.zeros_like(mask), BINARY, mask)
        column = near(picture[: 150 * scale, 200 * scale], TRUTH)
        widths.append(int(column.sum()))
    assert widths[1] >= 3 * widths[0]


def test_empty_and_full_masks():
    image = np.full((400, 500, 1), 77, np.uint8)
    for prediction in (np.zeros((400, 500), np.uint8), np.ones((400, 500), np.uint8)):
        picture = draw_overlay(image, prediction, BINARY)
        assert picture.shape[0] > 400
        assert picture.shape[1:] == (500, 3)
        assert near(picture[:400], PREDICTION).any() == prediction.any()
        assert not near(picture, TRUTH, 5)[:400].any(), "no truth was given"


def test_small_images_are_enlarged_by_a_whole_factor():
    image = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60, 1)
    picture = draw_overlay(image, np.zeros((40, 60), np.uint8), BINARY)
    assert picture.shape[1] == 360
    np.testing.assert_array_equal(picture[:240][::6, ::6, 0], image[..., 0])
    one = draw_overlay(image[:1, :1], np.ones((1, 1), np.uint8), BINARY, np.ones((1, 1), np.uint8))
    assert one.shape[1] == 320


def test_ignored_pixels_are_darkened():
    truth = square()
    truth[:50] = IGNORE
    picture = draw_overlay(np.full((400, 500, 3), 200, np.uint8), square(), BINARY, truth)
    assert (picture[:40, :40] == 66).all()


def test_every_class_has_its_colour_and_its_name():
    labels = Labels.from_config({"bg": 0, **{f"c{i}": i for i in range(1, 10)}})
    image = np.full((300, 900, 3), 100, np.uint8)
    truth = np.zeros((300, 900), np.uint8)
    for index in range(1, 10):
        truth[100:200, 90 * index : 90 * index + 60] = index
    picture = draw_overlay(image, np.zeros_like(truth), labels, truth)
    for index in range(1, 10):
        part = picture[95:105, 90 * index + 5 : 90 * index + 55]
        assert near(part, CLASSES[(index - 1) % len(CLASSES)]).any(axis=0).mean() > 0.9


def test_regions_overlap():
    labels = Labels.from_config({"bg": 0, "rim": 1, "core": 2}, {"whole": ["rim", "core"], "core": ["core"]})
    indices = np.array([[0, 1, 2]], np.uint8)
    assert foreground_masks(indices, labels).tolist() == [[[False, True, True]], [[False, False, True]]]
    several = Labels.from_config({"bg": 0, "rim": 1, "core": 2})
    assert foreground_masks(indices, several).tolist() == [[[False, True, False]], [[False, False, True]]]
    assert foreground_masks(np.array([[0, 1, IGNORE]], np.uint8), BINARY).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("name", ["<b>&\n\x1b\u202e", "名前", "x" * 500, "", "Gefäß " * 30])
def test_any_class_name_fits_into_the_legend(name):
    labels = Labels(("bg", name, "b"), ((0,), (1,), (2,)))
    picture = draw_overlay(np.zeros((50, 400, 3), np.uint8), square((50, 400), (5, 5, 20, 20)), labels, note=name)
    assert picture.shape[1] == 400


def test_the_note_is_drawn():
    image, mask = np.zeros((100, 400, 3), np.uint8), square((100, 400), (10, 10, 50, 50))
    assert (draw_overlay(image, mask, BINARY, note="Dice 0.5") != draw_overlay(image, mask, BINARY)).any()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_png_round_trip(tmp_path, kind):
    grey = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (5, 7)).astype(kind)
    write_png(tmp_path / "grey.png", grey)
    with Image.open(tmp_path / "grey.png") as image:
        np.testing.assert_array_equal(np.asarray(image), grey)
    assert encode_png(grey) == encode_png(grey.copy())
    colour = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    write_png(tmp_path / "colour.png", colour)
    with Image.open(tmp_path / "colour.png") as image:
        np.testing.assert_array_equal(np.asarray(image), colour)


def test_safe_name():
    assert safe_name("a b/c\\d:e\n<x>") == "a_b_c_d_e__x_"
    assert safe_name("../..") == "_"
    assert safe_name("") == "_"
    assert safe_name("名前-é") == "名前-é"
    assert len(safe_name("é" * 300).encode()) == 100
    assert "\udcff" not in safe_name("a\udcff")
