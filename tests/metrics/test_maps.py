import numpy as np
import pytest

from visattn.metrics.maps import map_metrics, protocol_levels


def case(blob, seed):
    """A truth and a probability map from good to unrelated, of any size, soft or hard."""
    generator = np.random.default_rng(seed)
    shape = tuple(generator.integers(9, 97, 2))
    field = blob(generator, shape, generator.uniform(0.5, 6))
    truth = field > np.quantile(field, generator.uniform(0.3, 0.97))
    probability = blob(generator, shape, 2) * generator.uniform(0.5, 3) + truth * generator.uniform(0.1, 1)
    probability /= probability.max() * generator.uniform(1, 3)
    if seed % 3 == 0:
        probability = (probability > probability.mean()).astype(float)
    return probability.astype(np.float32), truth


@pytest.mark.parametrize("seed", range(40))
def test_equal_to_pysodmetrics(blob, pysodmetrics, seed):
    probability, truth = case(blob, seed)
    levels = protocol_levels(probability)
    metrics, curve = map_metrics(levels, truth)
    expected = pysodmetrics(levels, truth)
    assert metrics.keys() == expected.keys()
    expected["e_max"] = min(1.0, expected["e_max"])  # pysodmetrics: N / (N - 1) for a perfect map
    assert metrics == pytest.approx(expected, abs=1e-9)
    assert curve.shape == (256,)


@pytest.mark.parametrize("value", [1.0, 0.69])
def test_constant_maps_equal_pysodmetrics(blob, pysodmetrics, value):
    _, truth = case(blob, 1)
    levels = protocol_levels(np.full(truth.shape, value))
    assert np.unique(levels).tolist() == [round(value * 255)]
    metrics, expected = map_metrics(levels, truth)[0], pysodmetrics(levels, truth)
    if value < 1:
        # In a quadrant without truth S asks whether a variance is exactly 0, which floating point answers by chance.
        del metrics["s_measure"], expected["s_measure"]
    assert metrics == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")
def test_a_truth_that_fills_the_image(pysodmetrics):
    levels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    levels[0, :2] = 0, 255
    truth = np.ones((20, 30), bool)
    expected = pysodmetrics(levels, truth)
    expected["e_max"] = 1.0  # pysodmetrics: 600 / 599
    assert map_metrics(levels, truth)[0] == pytest.approx(expected, abs=1e-9)


def test_structure_by_hand():
    # Truth and map equal: every object scores 2 / (1 + 1), every quadrant 1. Inverted: objects 0, quadrants negative.
    truth = np.zeros((8, 8), bool)
    truth[2:6, 2:6] = True
    levels = np.where(truth, 255, 0).astype(np.uint8)
    perfect = map_metrics(levels, truth)[0]
    assert [perfect[name] for name in ("s_measure", "wfm", "e_max", "mae")] == pytest.approx([1, 1, 1, 0])
    assert map_metrics(255 - levels, truth)[0]["s_measure"] == 0.0


@pytest.mark.parametrize("side", [2, 3, 5, 300])
def test_e_never_exceeds_one(side, pysodmetrics):
    truth = np.zeros((side, side), bool)
    truth[: side // 2] = True
    levels = np.where(truth, 255, 0).astype(np.uint8)
    metrics, _ = map_metrics(levels, truth)
    assert pysodmetrics(levels, truth)["e_max"] > 1  # what is guarded against
    assert metrics["e_max"] == 1.0
    assert metrics["e_mean"] <= 1.0


def test_predictions_below_one_half_score_high_under_the_protocol():
    # Why the protocol's Dice stands beside Dice at 0.5 and not in its place.
    truth = np.zeros((60, 60), bool)
    truth[20:40, 15:45] = True
    probability = np.where(truth, 0.4, 0.01)
    metrics, _ = map_metrics(protocol_levels(probability), truth)
    assert not (probability >= 0.5).any()
    assert metrics["pranet_dice"] == pytest.approx((255 + 2 * 600 / (600 + 3600)) / 256)


def test_truth_in_the_last_column_leaves_two_quadrants_without_pixels():
    truth = np.zeros((9, 9), bool)
    truth[3:6, 8] = True
    levels = np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8)
    assert 0 < map_metrics(levels, truth)[0]["s_measure"] < 1  # NaN in pysodmetrics


def test_levels_are_stretched_and_rounded():
    probability = np.array([[0.25, 0.375, 0.5, 0.75]])
    assert protocol_levels(probability).tolist() == [[0, 64, 128, 255]]
    valid = np.array([[True, True, True, False]])
    assert protocol_levels(probability, valid)[0, :3].tolist() == [0, 128, 255]
    assert protocol_levels(probability > 0.4).tolist() == [[0, 0, 255, 255]]
    assert not protocol_levels(probability, np.zeros_like(valid)).any()


def test_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        protocol_levels(np.array([[0.1, np.nan]]))
    with pytest.raises(ValueError, match="not empty"):
        map_metrics(np.zeros((4, 4), np.uint8), np.zeros((4, 4), bool))
    with pytest.raises(ValueError, match=r"images \(H, W\)"):
        map_metrics(np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), bool))
