import numpy as np
import pytest
import torch
from torchmetrics.classification import BinaryCalibrationError

from visattn.labels import IGNORE
from visattn.metrics.calibration import BINS, count_bins, describe_calibration


def some(labels, seed=0, shape=(19, 23)):
    generator = np.random.default_rng(seed)
    probabilities = generator.random((labels.channels, *shape)).astype(np.float32)
    if labels.activation == "softmax":
        probabilities /= probabilities.sum(axis=0)
    truth = generator.integers(0, len(labels.names), shape).astype(np.uint8)
    truth[:3] = IGNORE
    return probabilities, truth


def members(labels, name):
    """Class indices that make up a foreground class."""
    regions = dict(labels.regions)
    return {labels.names.index(label) for label in regions.get(name, [name])}


@pytest.mark.parametrize("kind", ["binary", "three", "regions"])
def test_bins_are_those_of_a_loop(request, kind):
    labels = request.getfixturevalue(kind)
    probabilities, truth = some(labels)
    sums = count_bins(probabilities, truth, labels)
    found = describe_calibration(sums, labels)
    assert list(found) == list(labels.foreground)
    for name, maps in zip(labels.foreground, probabilities[-len(labels.foreground) :], strict=True):
        pixels = [
            (float(p), int(t) in members(labels, name))
            for p, t in zip(maps.ravel(), truth.ravel(), strict=True)
            if t != IGNORE
        ]
        ece = 0.0
        for number in range(BINS):
            inside = [
                (p, t) for p, t in pixels if number / BINS <= p < (number + 1) / BINS or (p == 1 and number == BINS - 1)
            ]
            assert found[name]["count"][number] == len(inside)
            if inside:
                confidence = sum(p for p, _ in inside) / len(inside)
                frequency = sum(t for _, t in inside) / len(inside)
                assert found[name]["confidence"][number] == pytest.approx(confidence)
                assert found[name]["frequency"][number] == pytest.approx(frequency)
                ece += len(inside) / len(pixels) * abs(frequency - confidence)
            else:
                assert found[name]["confidence"][number] is None
                assert found[name]["frequency"][number] is None
        assert sum(found[name]["count"]) == len(pixels)
        assert found[name]["ece"] == pytest.approx(ece)


@pytest.mark.parametrize("kind", ["binary", "three", "regions"])
def test_ece_is_that_of_torchmetrics(request, kind):
    labels = request.getfixturevalue(kind)
    probabilities, truth = some(labels, seed=1)
    probabilities **= 2  # not calibrated
    found = describe_calibration(count_bins(probabilities, truth, labels), labels)
    for name, maps in zip(labels.foreground, probabilities[-len(labels.foreground) :], strict=True):
        target = np.isin(truth, list(members(labels, name))).astype(int)
        target[truth == IGNORE] = -1
        oracle = BinaryCalibrationError(n_bins=BINS, norm="l1", ignore_index=-1)
        expected = oracle(torch.from_numpy(maps), torch.from_numpy(target)).item()
        assert expected > 0.05
        assert found[name]["ece"] == pytest.approx(expected, abs=1e-6)


def test_edges_belong_to_the_bin_above_and_one_to_the_last(binary):
    probabilities = np.array([[[0.0, 0.5, 0.4999, 1.0]]])
    truth = np.array([[0, 1, 0, 1]], np.uint8)
    found = describe_calibration(count_bins(probabilities, truth, binary), binary)["polyp"]
    assert found["count"] == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert found["frequency"][4:6] == [0.0, 1.0]
    assert found["ece"] == pytest.approx((0.4999 + 0.5) / 4)


def test_a_perfect_and_a_reversed_prediction(binary):
    truth = np.random.default_rng(2).integers(0, 2, (9, 9)).astype(np.uint8)
    for probabilities, ece in ((truth, 0.0), (1 - truth, 1.0)):
        found = describe_calibration(count_bins(probabilities[None].astype(float), truth, binary), binary)
        assert found["polyp"]["ece"] == ece


def test_nothing_counted_has_no_error(binary):
    truth = np.full((4, 4), IGNORE, np.uint8)
    found = describe_calibration(count_bins(np.ones((1, 4, 4)), truth, binary), binary)["polyp"]
    assert found["ece"] is None
    assert set(found["confidence"]) == set(found["frequency"]) == {None}


@pytest.mark.parametrize("value", [np.nan, -0.01, 1.01])
def test_what_is_no_probability_is_refused(binary, value):
    with pytest.raises(ValueError, match="'polyp' is not in"):
        count_bins(np.array([[[0.5, value]]]), np.zeros((1, 2), np.uint8), binary)
    with pytest.raises(ValueError, match="shape"):
        count_bins(np.zeros((2, 1, 2)), np.zeros((1, 2), np.uint8), binary)
