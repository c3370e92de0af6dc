import numpy as np

from visattn.data.cases import PHANTOM_COUNT, find_cases
from visattn.data.images import read_image, read_mask
from visattn.data.phantom import SIZE, phantom_images, write_phantom


def test_images_are_functions_of_seed_and_index():
    short, long, other = (list(phantom_images(*arguments)) for arguments in ((3, 1), (5, 1), (3, 2)))
    for (image, mask, name), (again, mask_again, name_again) in zip(short, long, strict=False):
        assert np.array_equal(image, again)
        assert np.array_equal(mask, mask_again)
        assert name == name_again
    assert not np.array_equal(short[0][0], other[0][0])


def test_shapes_values_and_sizes():
    for size in ((96, 96), (61, 87)):
        image, mask, _ = next(phantom_images(1, 0, size))
        assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
        assert (mask.shape, mask.dtype) == (size, np.uint8)
        assert set(np.unique(mask)) <= {0, 255}


def test_a_tenth_is_empty_and_the_rest_is_neither_tiny_nor_full():
    shares = np.array([(mask > 0).mean() for _, mask, _ in phantom_images(200, 3, (72, 88))])
    assert 8 <= (shares == 0).sum() <= 35
    filled = shares[shares > 0]
    assert filled.min() > 0.001
    assert filled.max() < 0.6
    assert 0.03 < np.median(filled) < 0.2


def test_colour_alone_does_not_find_the_polyps():
    # The best quadratic function of a pixel's colour, fitted to the very images it is scored on.
    colours, truth = [], []
    for image, mask, _ in phantom_images(60, 5, (72, 88)):
        colours.append(image.reshape(-1, 3) / 255.0 - 0.5)
        truth.append(mask.ravel() > 0)
    x, y = np.concatenate(colours), np.concatenate(truth)
    features = np.concatenate([np.ones((len(x), 1)), x, x**2, x[:, :1] * x[:, 1:], x[:, 1:2] * x[:, 2:]], axis=1)
    score = features @ np.linalg.lstsq(features, y.astype(float), rcond=None)[0]
    dice = [
        2 * (y & (score > t)).sum() / (y.sum() + (score > t).sum())
        for t in np.quantile(score, np.linspace(0, 0.99, 50))
    ]
    assert max(dice) < 0.35


def test_polyps_stand_out_from_the_wall():
    # ... and yet they are there to be seen: their outline carries far more gradient than the rest of the wall.
    import cv2

    ratios = []
    for image, mask, _ in phantom_images(40, 6):
        if not mask.any():
            continue
        ring = (cv2.dilate(mask, np.ones((5, 5))) != cv2.erode(mask, np.ones((5, 5)))) & (image.sum(-1) > 30)
        grey = cv2.GaussianBlur(image, (0, 0), 1).astype(float).mean(-1)
        slope = np.hypot(*np.gradient(grey))
        ratios.append(np.median(slope[ring]) / np.median(slope[image.sum(-1) > 30]))
    assert np.median(ratios) > 1.5


def test_written_phantom_is_a_root(tmp_path):
    write_phantom(tmp_path, 4, seed=9)
    cases = find_cases([str(tmp_path)])
    assert len(cases) == 4
    for case, (image, mask, name) in zip(cases, phantom_images(4, 9), strict=True):
        assert case.name == name
        assert np.array_equal(read_image(case.image), image)
        assert np.array_equal(read_mask(case.mask), mask)
    assert read_mask(cases[0].mask).shape == SIZE


def test_the_word_phantom_is_a_root_of_two_hundred():
    assert len(find_cases(["phantom"])) == PHANTOM_COUNT == 200
