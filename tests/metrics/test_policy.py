"""No mean gets better when a network finds less or invents more: the rule behind every decision on empty masks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from visattn.labels import Labels
from visattn.metrics import METRICS, SegmentationMetrics, summarise

BINARY = Labels.from_config({"background": 0, "polyp": 255})
THREE = Labels.from_config({"background": 0, "liver": 1, "tumour": 2})
REGIONS = Labels.from_config({"background": 0, "rim": 1, "core": 2}, regions={"whole": ["rim", "core"], "in": ["core"]})


@st.composite
def case(draw, labels):
    """Prediction, truth and probabilities of one case, of any quality; each may be empty or fill the image."""
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    shape = draw(st.integers(3, 14)), draw(st.integers(3, 14))
    smooth = draw(st.sampled_from([0.0, 1.0, 2.5]))
    field = gaussian_filter(generator.normal(size=(labels.channels, *shape)), (0, smooth, smooth))
    truth_field = field + draw(st.sampled_from([0.0, 0.3, 3.0])) * generator.normal(size=field.shape)

    def stretched(values, offset):
        return 1 / (1 + np.exp(-4 * values / (values.std() + 1e-9) + offset))

    offset = draw(st.sampled_from([-30.0, -3.0, 0.0, 3.0, 8.0, 30.0]))
    probabilities = stretched(field, offset)
    truth = labels.from_probabilities(stretched(truth_field, draw(st.sampled_from([-30.0, 0.0, 3.0, 8.0]))))
    if draw(st.integers(0, 4)) == 0:
        truth = np.zeros_like(truth)
    if draw(st.booleans()):  # as `evaluate` sees it: masks without a map
        probabilities = as_probabilities(labels, labels.from_probabilities(probabilities))
    prediction = labels.from_probabilities(probabilities)
    if draw(st.integers(0, 3)) == 0:
        truth = np.where(generator.random(shape) < 0.3, 255, truth).astype(np.uint8)
    return prediction, truth, probabilities


def as_probabilities(labels, indices):
    return np.asarray(labels.onehot(indices), np.float64)


def means(labels, cases):
    metric = SegmentationMetrics(labels, "full")
    for number, (prediction, truth, probabilities) in enumerate(cases):
        metric.update(str(number), prediction, truth, probabilities)
    found = metric.compute()
    for entry in summarise(metric.rows(), n=2):
        assert found[f"{entry.name}/{entry.metric}"] == pytest.approx(entry.mean, nan_ok=True)
    return {key: value for key, value in found.items() if key.split("/")[-1] not in ("cases", "undefined")}


def improvements(before, after):
    """The means that are better `after`; a mean that exists in one of the two only is no better."""
    better = []
    for key, value in before.items():
        name = key.split("/")[1].removesuffix("_curve")
        gain = after[key] - value if METRICS[name].higher_is_better else value - after[key]
        if gain > 1e-12:
            better.append(key)
    return better


def has(labels, indices, truth):
    return np.asarray(labels.onehot(indices))[-len(labels.foreground) :][:, truth != 255].any(axis=1)


@pytest.mark.parametrize("labels", [BINARY, THREE, REGIONS], ids=["binary", "classes", "regions"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_turning_a_hit_into_a_miss_improves_no_mean(labels, data):
    cases = data.draw(st.lists(case(labels), min_size=1, max_size=3))
    prediction, truth, _ = hit = cases[0]
    # Removing a prediction of a class that is not there is an improvement; everything else is a loss.
    if (has(labels, prediction, truth) & ~has(labels, truth, truth)).any():
        return
    empty = np.zeros_like(prediction)
    constant = np.full(hit[2].shape, data.draw(st.sampled_from([0.0, 0.01, 0.3])))
    if labels is THREE:
        constant[0] = 1 - 2 * constant[1]
    missed = [(empty, truth, data.draw(st.sampled_from([constant, as_probabilities(labels, empty)]))), *cases[1:]]
    assert improvements(means(labels, cases), means(labels, missed)) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_false_alarm_on_an_empty_image_improves_no_mean(data):
    cases = data.draw(st.lists(case(BINARY), min_size=1, max_size=3))
    prediction, truth, probabilities = cases[0]
    truth = np.where(truth == 255, 255, 0).astype(np.uint8)
    silent = [(np.zeros_like(prediction), truth, np.zeros_like(probabilities)), *cases[1:]]
    alarmed = [(prediction, truth, probabilities), *cases[1:]]
    assert improvements(means(BINARY, silent), means(BINARY, alarmed)) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_more_false_pixels_improve_no_overlap(data):
    cases = data.draw(st.lists(case(BINARY), min_size=1, max_size=3))
    prediction, truth, _ = cases[0]
    extra = np.random.default_rng(data.draw(st.integers(0, 99))).random(truth.shape) < 0.2
    worse = [(np.where(extra & (truth != 1), 1, prediction).astype(np.uint8), truth, None), *cases[1:]]
    overlap = [name for name, info in METRICS.items() if info.suite == "headline"]
    found = improvements(means(BINARY, cases), means(BINARY, worse))
    assert [key for key in found if key.split("/")[1] in overlap] == []


def test_leaving_misses_out_would_be_noticed():
    # MONAI's HD95 of a missed case is NaN and drops out of the mean, which then improves.
    hits, with_a_miss = [10.0, 30.0], [10.0, math.nan]
    assert improvements({"mean/hd95": np.nanmean(hits)}, {"mean/hd95": np.nanmean(with_a_miss)}) == ["mean/hd95"]
    assert improvements({"mean/dice": 0.5}, {"mean/dice": 0.6}) == ["mean/dice"]
    assert improvements({"mean/mae": 0.5, "mean/dice": 0.5}, {"mean/mae": 0.6, "mean/dice": 0.5}) == []
