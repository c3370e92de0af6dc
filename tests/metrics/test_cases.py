import math
import subprocess
import sys

import numpy as np
import pytest

from visattn.labels import IGNORE
from visattn.metrics import METRICS, SUITES, case_metrics, cases

MAP = [name for name, info in METRICS.items() if info.suite == "full"]


def square(top, left, side=10, shape=(40, 50)):
    mask = np.zeros(shape, np.uint8)
    mask[top : top + side, left : left + side] = 1
    return mask


def test_ignore_is_the_labels_own():
    assert cases._IGNORE == IGNORE


@pytest.mark.parametrize("suite", ["headline", "surface", "full"])
def test_rows_hold_the_suite_in_order(binary, suite):
    (row,) = case_metrics(square(5, 5), square(6, 6), binary, suite=suite)
    assert tuple(row) == SUITES[suite]


def test_overlap_by_hand(binary):
    # Two 10 x 10 squares, one 2 lower and 5 further right: 8 x 5 in common.
    (row,) = case_metrics(square(12, 15), square(10, 10), binary)
    assert row == pytest.approx(
        {
            "dice": 80 / 200,
            "iou": 40 / 160,
            "precision": 0.4,
            "recall": 0.4,
            "specificity": (2000 - 160) / (2000 - 100),
            "fpr_empty": None,
        }
    )


EMPTY = np.zeros((40, 50), np.uint8)
DIAGONAL = math.hypot(40, 50)
WORST = {name: 0.0 for name in SUITES["full"]} | {"mae": 1.0, "hd95": DIAGONAL, "hd95_rel": 1.0}


def test_a_miss_has_the_worst_value_of_every_measure(binary):
    (row,) = case_metrics(EMPTY, square(5, 5), binary, suite="full")
    assert row == WORST | {"fpr_empty": None}
    (below,) = case_metrics(EMPTY, square(5, 5), binary, np.full((1, 40, 50), 0.01), suite="full")
    assert below == row


def test_a_miss_in_pixels_leaves_the_map_to_its_own_measures(binary):
    truth = square(5, 5)
    (row,) = case_metrics(EMPTY, truth, binary, truth[None] * 0.4, suite="full")
    assert (row["dice"], row["hd95"], row["mae"]) == (0, DIAGONAL, 0)
    assert row["pranet_dice"] > 0.99
    assert row["s_measure"] == pytest.approx(1)


def test_a_false_alarm_has_the_worst_value_where_there_is_one(binary):
    (row,) = case_metrics(square(5, 5), EMPTY, binary, suite="full")
    assert row == WORST | {"recall": None, "hd95": None, "fpr_empty": 1.0}


def test_neither_is_undefined(binary):
    (row,) = case_metrics(EMPTY, EMPTY, binary, np.random.default_rng(0).random((1, 40, 50)) * 0.4, suite="full")
    assert row == {name: None for name in SUITES["full"]} | {"fpr_empty": 0.0}


def test_without_a_hit_specificity_is_zero(binary):
    (row,) = case_metrics(square(5, 5), square(25, 25), binary)
    assert row["specificity"] == row["dice"] == 0.0
    (full,) = case_metrics(square(5, 5), np.ones((40, 50), np.uint8), binary)
    assert full["specificity"] is None


def test_every_measure_of_a_perfect_case_is_best(binary):
    (row,) = case_metrics(square(5, 5), square(5, 5), binary, suite="full")
    over_thresholds = {"pranet_dice", "pranet_iou", "e_mean"}  # threshold 0 takes the whole image
    for name in set(SUITES["full"]) - over_thresholds - {"fpr_empty"}:
        assert row[name] == pytest.approx(METRICS[name].best), name
    assert all(0.99 < row[name] < 1 for name in over_thresholds)


def test_ignored_pixels_change_nothing(binary, blob):
    generator = np.random.default_rng(0)
    probability = 0.1 + 0.7 * blob(generator, (1, 40, 50))  # so that 0 and 1 would stretch it
    truth = square(12, 14, 14)
    truth[15:30, 20:34] = IGNORE
    expected = case_metrics((probability[0] >= 0.5).astype(np.uint8), truth, binary, probability, "full")
    for value in (0.0, 1.0):
        changed = probability.copy()
        changed[0][truth == IGNORE] = value
        prediction = (changed[0] >= 0.5).astype(np.uint8)
        assert case_metrics(prediction, truth, binary, changed, "full") == expected
    # The check can see a difference: one pixel that does count.
    changed[0, 0, 0] = 1 - changed[0, 0, 0].round()
    assert case_metrics((changed[0] >= 0.5).astype(np.uint8), truth, binary, changed, "full") != expected


def test_ignoring_a_strip_is_cropping_it(binary, blob):
    generator = np.random.default_rng(3)
    truth, probability = square(12, 8, 15), blob(generator, (1, 40, 50))
    prediction = (probability[0] >= 0.5).astype(np.uint8)
    (cropped,) = case_metrics(
        prediction[:, :38], truth[:, :38], binary, np.ascontiguousarray(probability[:, :, :38]), "full"
    )
    truth[:, 38:] = IGNORE
    (ignored,) = case_metrics(prediction, truth, binary, probability, "full")
    del cropped["hd95_rel"], ignored["hd95_rel"]  # the diagonal is the image's own
    assert ignored == pytest.approx(cropped, abs=1e-12)


def test_a_case_that_is_all_ignored_is_no_empty_image(binary):
    (row,) = case_metrics(square(5, 5), np.full((40, 50), IGNORE, np.uint8), binary, suite="full")
    assert set(row.values()) == {None}


def test_a_predicted_ignore_is_background(binary):
    prediction = square(5, 5)
    prediction[30:] = IGNORE
    assert case_metrics(prediction, square(5, 5), binary) == case_metrics(square(5, 5), square(5, 5), binary)


def test_classes_are_scored_one_by_one(three, binary, blob):
    generator = np.random.default_rng(4)
    truth = np.digitize(blob(generator, (40, 50)), [0.5, 0.65]).astype(np.uint8)
    probabilities = np.stack([blob(generator, (40, 50)) for _ in range(3)])
    probabilities /= probabilities.sum(0)
    prediction = three.from_probabilities(probabilities)
    rows = case_metrics(prediction, truth, three, probabilities, "full")
    assert len(rows) == len(three.foreground) == 2
    for index, row in enumerate(rows, start=1):
        (alone,) = case_metrics(
            (prediction == index).astype(np.uint8),
            (truth == index).astype(np.uint8),
            binary,
            probabilities[[index]],
            "full",
        )
        assert row == alone


def test_regions_overlap(regions):
    truth, prediction = np.zeros((2, 20, 20), np.uint8)
    truth[2:12, 2:12], truth[5:9, 5:9] = 1, 2
    prediction[2:12, 2:12] = 1
    whole, centre = case_metrics(prediction, truth, regions)
    assert whole["dice"] == 1.0  # the rim belongs to it as much as the core
    assert centre["dice"] == 0.0


def test_volumes_have_distances_in_their_spacing(binary):
    truth, prediction = np.zeros((2, 9, 11, 13), np.uint8)
    truth[2, 3, 4], prediction[2, 3, 8] = 1, 1
    (row,) = case_metrics(prediction, truth, binary, suite="surface", spacing=(5.0, 1.0, 0.5), nsd_tolerance=2.0)
    assert (row["hd95"], row["nsd"]) == (2.0, 1.0)
    assert row["hd95_rel"] == pytest.approx(2 / math.hypot(45, 11, 6.5))
    with pytest.raises(ValueError, match="use 'surface'"):
        case_metrics(prediction, truth, binary, suite="full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((EMPTY[1:], EMPTY), r"prediction has shape \(39, 50\), truth \(40, 50\)"),
        ((EMPTY, EMPTY, np.zeros((2, 40, 50))), r"expected \(1, 40, 50\)"),
        ((EMPTY, EMPTY, None, "fast"), "unknown suite 'fast'; known: headline"),
        ((square(1, 1), square(1, 1), np.full((1, 40, 50), np.nan), "full"), "NaN"),
    ],
)
def test_refused(binary, arguments, message):
    prediction, truth, *rest = arguments
    with pytest.raises(ValueError, match=message):
        case_metrics(prediction, truth, binary, *rest)


def test_importing_the_measures_loads_no_torch():
    code = (
        "import sys, visattn.metrics\n"
        "assert not {'torch', 'torchmetrics', 'cv2'} & set(sys.modules)\n"
        "assert 'scipy.spatial' in sys.modules\n"  # what is imported does show
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_unknown_names_are_missing():
    import visattn.metrics

    with pytest.raises(AttributeError, match="no attribute 'Dice'"):
        visattn.metrics.Dice  # noqa: B018
