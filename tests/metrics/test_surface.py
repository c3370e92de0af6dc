import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from visattn.metrics import surface
from visattn.metrics.surface import diagonal, edges, hausdorff, surface_dice, surface_distances

SHAPES = [((23, 31), None), ((37, 19), (0.7, 1.9)), ((11, 7, 13), None), ((5, 13, 17), (3.3, 0.5, 0.9))]


def masks(blob, seed, shape):
    generator = np.random.default_rng(seed)
    first = blob(generator, shape, generator.uniform(0, 3))
    second = first + generator.uniform(0.1, 1) * blob(generator, shape, generator.uniform(0, 2))
    return first > np.quantile(first, generator.uniform(0.3, 0.95)), second > np.quantile(
        second, generator.uniform(0.3, 0.95)
    )


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
def test_equal_to_monai(blob, seed, shape, spacing):
    prediction, truth = masks(blob, seed, shape)
    distances = surface_distances(prediction, truth, spacing)
    a, b = torch.tensor(prediction)[None, None].float(), torch.tensor(truth)[None, None].float()

    hd95 = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing).item()
    # MONAI interpolates the percentile in float32, we in float64.
    assert hausdorff(distances) == pytest.approx(hd95, rel=3e-6, abs=1e-6)
    largest = compute_hausdorff_distance(a, b, include_background=True, spacing=spacing).item()
    assert hausdorff(distances, 100) == pytest.approx(largest, rel=1e-6)
    for tolerance in (0.0, 1.3, 2.5):
        expected = compute_surface_dice(a, b, [tolerance], include_background=True, spacing=spacing).item()
        assert surface_dice(distances, tolerance) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
def test_equal_to_brute_force(blob, shape, spacing):
    prediction, truth = masks(blob, 99, shape)
    sides = np.array(spacing or [1.0] * len(shape))

    def border(mask):
        padded = np.pad(mask, 1)
        found = []
        for index in np.argwhere(mask):
            neighbours = [index + 1 + step * axis for axis in np.eye(mask.ndim, dtype=int) for step in (-1, 1)]
            if not all(padded[tuple(neighbour)] for neighbour in neighbours):
                found.append(index * sides)
        return np.array(found)

    one, other = border(prediction), border(truth)
    table = np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1))
    distances = surface_distances(prediction, truth, spacing)
    np.testing.assert_allclose(distances[0], table.min(1), rtol=1e-12)
    np.testing.assert_allclose(distances[1], table.min(0), rtol=1e-12)


@pytest.mark.parametrize(("shape", "spacing"), SHAPES)
def test_tree_and_transform_agree(blob, monkeypatch, shape, spacing):
    prediction, truth = masks(blob, 5, shape)
    results = []
    for dense in (-1.0, 2.0):  # always the transform, always the tree
        monkeypatch.setattr(surface, "_DENSE", dense)
        results.append(surface_distances(prediction, truth, spacing))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_two_pixels_by_hand():
    prediction, truth = np.zeros((2, 7, 9), bool)
    prediction[1, 1], truth[4, 5] = True, True
    assert hausdorff(surface_distances(prediction, truth)) == 5.0
    assert hausdorff(surface_distances(prediction, truth, (2.0, 0.5))) == pytest.approx(np.hypot(6.0, 2.0))


def test_the_image_border_is_an_edge():
    full = np.ones((4, 5), bool)
    assert edges(full).tolist() == [
        [True] * 5,
        [True, False, False, False, True],
        [True, False, False, False, True],
        [True] * 5,
    ]


def test_tolerance_counts_steps_of_a_decimal_spacing():
    prediction, truth = np.zeros((2, 9), bool)
    prediction[1], truth[4] = True, True
    assert surface_dice(surface_distances(prediction, truth, (0.1,)), 0.3) == 1.0
    assert surface_dice(surface_distances(prediction, truth, (0.1,)), 0.29) == 0.0


def test_diagonal_is_longer_than_any_distance():
    assert diagonal((3, 4)) == 5.0
    assert diagonal((3, 4, 12), (1, 1, 1)) == 13.0
    assert diagonal((3, 4), (10.0, 10.0)) == 50.0
    corners = np.zeros((2, 30, 40), bool)
    corners[0, 0, 0], corners[1, -1, -1] = True, True
    assert hausdorff(surface_distances(*corners)) < diagonal((30, 40))


@pytest.mark.parametrize(
    ("prediction", "truth", "spacing", "message"),
    [
        (np.ones((3, 4)), np.ones((4, 3)), None, r"shape \(3, 4\), truth \(4, 3\)"),
        (np.zeros((3, 4)), np.ones((3, 4)), None, "empty mask"),
        (np.ones((3, 4)), np.ones((3, 4)), (1.0,), "2 positive numbers"),
        (np.ones((3, 4)), np.ones((3, 4)), (1.0, 0.0), "2 positive numbers"),
    ],
)
def test_refused(prediction, truth, spacing, message):
    with pytest.raises(ValueError, match=message):
        surface_distances(prediction.astype(bool), truth.astype(bool), spacing)
