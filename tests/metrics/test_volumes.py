"""Measures in mm and ml: against MONAI, analytic spheres, and the computation on the whole grid."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy.ndimage import binary_dilation, distance_transform_edt

from visattn.labels import Labels
from visattn.metrics import METRICS, SUITES, case_metrics, digits, metrics_of
from visattn.metrics.surface import bounding_box, hausdorff, surface_dice, surface_distances

TUMOUR = Labels.from_config({"background": 0, "tumour": 1})
THREE = Labels.from_config({"background": 0, "liver": 1, "tumour": 2})
REGIONS = Labels.from_config(
    {"background": 0, "rim": 1, "core": 2}, regions={"whole": ["rim", "core"], "centre": ["core"]}
)


def sphere(shape, spacing, centre, radius):
    """Voxels whose middle lies within `radius` mm of `centre` in mm."""
    axes = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij", sparse=True)
    return sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) <= radius**2


SPACINGS = [(1.0, 1.0, 1.0), (0.6, 0.6, 3.0), (2.0, 0.5, 1.1)]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spheres_have_the_distances_that_geometry_says(spacing):
    shape = tuple(math.ceil(60 / side) for side in spacing)
    step = max(spacing)
    inner, outer = (sphere(shape, spacing, (30, 30, 30), radius) for radius in (12, 18))
    (row,) = case_metrics(outer.astype(np.uint8), inner.astype(np.uint8), TUMOUR, suite="volume", spacing=spacing)
    assert row["hd95"] == pytest.approx(6, abs=step), "concentric: everywhere the difference of the radii"
    ball = 4 / 3 * math.pi / 1000
    assert row["true_ml"] == pytest.approx(ball * 12**3, rel=0.05)
    assert row["volume_error"] == pytest.approx(ball * (18**3 - 12**3), rel=0.05)
    assert row["dice"] == pytest.approx(2 * 12**3 / (12**3 + 18**3), rel=0.05)
    assert row["lesion_f1"] == 1
    for tolerance, near in ((6 + step, 1), (6 - step, 0)):
        (row,) = case_metrics(
            outer.astype(np.uint8),
            inner.astype(np.uint8),
            TUMOUR,
            suite="surface",
            spacing=spacing,
            nsd_tolerance=tolerance,
        )
        assert row["nsd"] == pytest.approx(near, abs=0.01)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shifted_sphere_is_as_far_as_it_was_shifted(spacing, axis):
    shape = tuple(math.ceil(60 / side) for side in spacing)
    truth = sphere(shape, spacing, (30, 30, 30), 14)
    steps = round(6 / spacing[axis])
    moved = np.roll(truth, steps, axis)
    furthest = hausdorff(surface_distances(moved, truth, spacing), 100)
    assert furthest == pytest.approx(steps * spacing[axis], rel=1e-9), "at the pole exactly"
    hd95 = hausdorff(surface_distances(moved, truth, spacing))
    assert 0.75 * furthest < hd95 <= furthest


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
def test_a_case_in_mm_is_monais(blob, spacing):
    generator = np.random.default_rng(3)
    first = blob(generator, (24, 20, 15), 2.0)
    prediction, truth = first > 0.6, np.roll(first, 2, 0) + 0.2 * blob(generator, (24, 20, 15), 1.0) > 0.65
    (row,) = case_metrics(
        prediction.astype(np.uint8), truth.astype(np.uint8), TUMOUR, suite="volume", spacing=spacing, nsd_tolerance=1.7
    )
    a, b = (torch.tensor(mask)[None, None].float() for mask in (prediction, truth))
    expected = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=spacing).item()
    assert row["hd95"] == pytest.approx(expected, rel=3e-6)
    expected = compute_surface_dice(a, b, [1.7], include_background=True, spacing=spacing).item()
    assert row["nsd"] == pytest.approx(expected, abs=1e-6)


def whole_grid(prediction, truth, spacing, tolerance):
    """HD95, NSD and the counts without any crop or tree: two distance transforms of the whole grid."""
    edges = []
    for mask in (prediction, truth):
        outside = np.pad(~mask, 1, constant_values=True)
        edges.append(mask & binary_dilation(outside)[(slice(1, -1),) * mask.ndim])
    there = distance_transform_edt(~edges[1], sampling=spacing)[edges[0]]
    back = distance_transform_edt(~edges[0], sampling=spacing)[edges[1]]
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    return {
        "hd95": max(np.quantile(there, 0.95), np.quantile(back, 0.95)),
        "nsd": near / (len(there) + len(back)),
        "specificity": (~prediction & ~truth).sum() / (~truth).sum() if (prediction & truth).any() else 0.0,
        "true_ml": truth.sum() * math.prod(spacing) / 1000,
    }


@pytest.mark.parametrize("labels", [TUMOUR, THREE, REGIONS], ids=["binary", "classes", "regions"])
@pytest.mark.parametrize("seed", range(4))
def test_the_crop_changes_nothing(blob, labels, seed):
    generator = np.random.default_rng(seed)
    shape, spacing = (30, 26, 22), (0.7, 1.3, 2.9)
    truth, prediction = np.zeros((2, *shape), np.uint8)
    for mask in (truth, prediction):
        start = generator.integers(0, 12, 3)
        if seed == 0:
            start[:] = 0  # against the border, which is an edge too
        field = blob(generator, (14, 13, 10), 1.5)
        part = tuple(slice(a, a + n) for a, n in zip(start, field.shape, strict=True))
        mask[part] = (field > 0.45).astype(np.uint8) + (field > 0.6) * (len(labels.names) > 2)
    rows = case_metrics(prediction, truth, labels, suite="volume", spacing=spacing, nsd_tolerance=2.1)
    channels = [labels.onehot(mask)[-len(labels.foreground) :] for mask in (prediction, truth)]
    for row, predicted, true in zip(rows, *channels, strict=True):
        if predicted.any() and true.any():
            expected = whole_grid(predicted, true, spacing, 2.1)
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-9)


def test_a_miss_counts_the_diagonal_of_the_whole_image_not_of_the_crop():
    truth = np.zeros((30, 40, 120), np.uint8)
    truth[3, 3, 3] = 1
    (row,) = case_metrics(np.zeros_like(truth), truth, TUMOUR, suite="volume", spacing=(1.0, 2.0, 0.5))
    assert row["hd95"] == pytest.approx(math.sqrt(30**2 + 80**2 + 60**2))
    assert (row["hd95_rel"], row["nsd"]) == (1, 0)


def test_volume_is_that_of_the_voxel_where_axes_are_sheared():
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[1:3, 1:3, 1:3] = 1
    (row,) = case_metrics(mask, mask, TUMOUR, suite="volume", spacing=(10, 10, 10), voxel_ml=0.5)
    assert (row["true_ml"], row["predicted_ml"]) == (4, 4)


def test_shared_edges_lie_at_no_distance_by_tree_and_transform(blob, monkeypatch):
    from visattn.metrics import surface

    mask = blob(np.random.default_rng(0), (12, 13, 14)) > 0.5
    other = mask.copy()
    other[0] = False
    for dense in (-1.0, 2.0):
        monkeypatch.setattr(surface, "_DENSE", dense)
        assert all((distances == 0).all() for distances in surface_distances(mask, mask))
        assert 0 < surface_dice(surface_distances(mask, other), 0.0) < 1


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_bounding_box(shape):
    mask = np.zeros(shape, bool)
    assert mask[bounding_box(mask)].size == 0
    first, last = tuple(n // 2 for n in shape), tuple(n - 1 for n in shape)
    mask[first] = mask[last] = True
    assert bounding_box(mask) == tuple(slice(n // 2, n) for n in shape)


def test_units_of_a_table():
    assert metrics_of(SUITES["surface"])["hd95"].unit == METRICS["hd95"].unit == "px"
    assert metrics_of(SUITES["volume"])["hd95"].unit == "mm"
    assert (metrics_of(SUITES["volume"])["volume_error"].unit, metrics_of(())["dice"].unit) == ("ml", "")
    assert [digits(unit) for unit in ("", "px", "mm", "ml")] == [4, 1, 1, 2]


@pytest.mark.slow  # eight million voxels
def test_a_large_volume_is_scored_in_little_memory():
    import tracemalloc

    truth = np.zeros((240, 240, 155), np.uint8)
    truth[80:140, 90:150, 60:100] = 1
    truth[95:120, 100:130, 70:90] = 2
    prediction = np.roll(truth, (2, 1, 1), (0, 1, 2))
    tracemalloc.start()
    case_metrics(prediction, truth, THREE, suite="volume", spacing=(1, 1, 1))
    assert tracemalloc.get_traced_memory()[1] < 6 * truth.nbytes
    tracemalloc.stop()
