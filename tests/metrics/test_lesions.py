import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.labels import Labels
from visattn.metrics import DETAILS, Detection, LesionRule, SegmentationMetrics, case_metrics, detections
from visattn.metrics.lesions import find_lesions, lesion_measures, match_lesions

TUMOUR = Labels.from_config({"background": 0, "tumour": 1})
MM = (1.0, 1.0, 1.0)


def boxes(shape, *places):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[tuple(slice(*ends) for ends in place)] = True
    return mask


def row(prediction, truth, rule=None, spacing=(10.0, 10.0, 10.0)):
    """At 10 mm a voxel is 1 ml."""
    (found,) = case_metrics(
        prediction.astype(np.uint8),
        truth.astype(np.uint8),
        TUMOUR,
        suite="volume",
        spacing=spacing,
        lesions=rule or LesionRule(),
    )
    return found


def flood(mask):
    """Components by a plain search over all neighbours: a list of sets of voxels."""
    left, found = {tuple(voxel) for voxel in np.argwhere(mask).tolist()}, []
    steps = list(itertools.product((-1, 0, 1), repeat=mask.ndim))
    while left:
        queue, component = [left.pop()], set()
        while queue:
            voxel = queue.pop()
            component.add(voxel)
            for step in steps:
                other = tuple(a + b for a, b in zip(voxel, step, strict=True))
                if other in left:
                    left.remove(other)
                    queue.append(other)
        found.append(component)
    return found


def best_matching(ious):
    """Every one-to-one choice, tried."""
    best = (0.0, 0, [])
    rows, columns = ious.shape
    for count in range(min(rows, columns) + 1):
        for chosen in itertools.combinations(range(rows), count):
            for others in itertools.permutations(range(columns), count):
                values = [ious[pair] for pair in zip(chosen, others, strict=True)]
                if all(value > 0 for value in values):
                    best = max(best, (round(sum(values), 9), count, sorted(zip(chosen, others, strict=True))))
    return best


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(6, 7, 4), (9, 8), (4, 4, 9)]),
    density=st.sampled_from([0.05, 0.12, 0.2]),
    iou=st.sampled_from([0.0, 0.1, 0.3, 0.5]),
)
def test_lesions_and_matching_are_those_of_brute_force(seed, shape, density, iou):
    generator = np.random.default_rng(seed)
    truth = generator.random(shape) < density
    prediction = np.where(generator.random(shape) < 0.5, truth, generator.random(shape) < density)
    lesions = find_lesions(prediction, truth)
    true, predicted = flood(truth), flood(prediction)
    assert sorted(lesions.true) == sorted(map(len, true))
    assert sorted(lesions.predicted) == sorted(map(len, predicted))
    if max(len(true), len(predicted)) > 6:
        return
    ious = np.array([[len(a & b) / len(a | b) for b in predicted] for a in true]).reshape(len(true), len(predicted))
    ious[ious < iou - 1e-12] = 0
    total, count, _ = best_matching(ious)
    matches = match_lesions(lesions, iou)
    of_pair = {tuple(pair): value for pair, value in zip(lesions.pairs.tolist(), lesions.iou, strict=True)}
    assert sum(of_pair[tuple(pair)] for pair in matches.tolist()) == pytest.approx(total)
    assert len(matches) == count
    assert len(set(matches[:, 0])) == len(set(matches[:, 1])) == len(matches), "one to one"


def test_voxels_touch_at_a_corner():
    diagonal = np.zeros((3, 3, 3), bool)
    diagonal[0, 0, 0] = diagonal[1, 1, 1] = diagonal[2, 2, 2] = True
    assert find_lesions(diagonal, diagonal).true.tolist() == [3]
    assert find_lesions(diagonal[1], np.eye(3, dtype=bool)).true.tolist() == [3]


def test_one_to_one_prefers_the_sum_of_iou_over_the_first_come():
    # prediction 0 overlaps both true lesions; alone it fits the second far better
    truth = boxes((1, 1, 40), ((0, 1), (0, 1), (0, 10)), ((0, 1), (0, 1), (11, 31)))
    prediction = boxes((1, 1, 40), ((0, 1), (0, 1), (8, 31)))
    assert match_lesions(find_lesions(prediction, truth)).tolist() == [[1, 0]]


@pytest.mark.parametrize(("length", "found"), [(1, 1), (0, 0)])
def test_the_iou_has_to_be_reached(length, found):
    truth = boxes((1, 1, 20), ((0, 1), (0, 1), (0, 10)))
    prediction = boxes((1, 1, 20), ((0, 1), (0, 1), (0, length + 0)))
    scores = row(prediction, truth)
    assert scores["found_large"] == found, "1 of 10 voxels is an IoU of 0.1 exactly"


def test_scores_by_hand():
    truth = boxes((30, 10, 10), ((0, 3), (0, 1), (0, 1)), ((5, 6), (0, 1), (0, 1)), ((10, 20), (0, 1), (0, 1)))
    prediction = boxes(
        (30, 10, 10),
        ((0, 2), (0, 1), (0, 1)),
        ((10, 20), (0, 1), (0, 1)),
        ((25, 26), (5, 6), (5, 6)),
        ((28, 29), (9, 10), (0, 4)),
    )
    scores = row(prediction, truth)
    assert scores["lesion_precision"] == 2 / 4
    assert scores["lesion_recall"] == 2 / 3
    assert scores["lesion_f1"] == pytest.approx(2 * 2 / 7)
    assert (scores["true_ml"], scores["predicted_ml"], scores["volume_error"]) == (14, 17, 3)
    assert scores["volume_similarity"] == pytest.approx(1 - 3 / 31)
    assert [scores[name] for name in ("true_small", "found_small", "false_small")] == [1, 0, 1]
    assert [scores[name] for name in ("true_large", "found_large", "false_large")] == [2, 2, 1], "3 ml is large"


def test_the_minimum_volume_leaves_small_lesions_out_on_both_sides():
    truth = boxes((40, 1, 1), ((0, 4), (0, 1), (0, 1)), ((6, 7), (0, 1), (0, 1)), ((10, 15), (0, 1), (0, 1)))
    prediction = boxes(
        (40, 1, 1),
        ((0, 3), (0, 1), (0, 1)),
        ((6, 8), (0, 1), (0, 1)),
        ((20, 22), (0, 1), (0, 1)),
        ((30, 34), (0, 1), (0, 1)),
    )
    scores = row(prediction, truth, LesionRule(minimum_ml=4))
    # true: 4 and 5 ml count, 1 ml does not. 3 ml finds the one of 4 ml; 2 ml on that of 1 ml and 2 ml alone count for
    # nothing; 4 ml alone is false
    assert [scores[f"{name}_large"] for name in ("true", "found", "false")] == [2, 1, 1]
    assert [scores[f"{name}_small"] for name in ("true", "found", "false")] == [0, 0, 0]
    # 5 ml that lie on a lesion of 3 ml, which does not count, are not false
    scores = row(
        boxes((9, 1, 1), ((0, 5), (0, 1), (0, 1))), boxes((9, 1, 1), ((0, 3), (0, 1), (0, 1))), LesionRule(minimum_ml=4)
    )
    assert (scores["false_large"], scores["lesion_f1"]) == (0, None)
    only_small = row(prediction[:9], truth[5:14], LesionRule(minimum_ml=6))
    assert only_small["lesion_f1"] is None
    assert only_small["dice"] is not None


def test_merges_and_splits_are_counted():
    truth = boxes((1, 1, 30), ((0, 1), (0, 1), (0, 5)), ((0, 1), (0, 1), (6, 11)), ((0, 1), (0, 1), (20, 30)))
    prediction = boxes((1, 1, 30), ((0, 1), (0, 1), (0, 11)), ((0, 1), (0, 1), (20, 23)), ((0, 1), (0, 1), (25, 30)))
    scores = row(prediction, truth)
    assert (scores["merges"], scores["splits"]) == (1, 1)
    assert [scores[f"{name}_large"] for name in ("true", "found", "false")] == [3, 2, 1]
    # one voxel of the second lesion, or less than half of a prediction, is neither
    nearly = boxes((1, 1, 30), ((0, 1), (0, 1), (0, 7)), ((0, 1), (0, 1), (20, 29)))
    assert (row(nearly, truth)["merges"], row(nearly, truth)["splits"]) == (0, 0)


NOTHING = np.zeros((4, 5, 6), bool)
LESION = boxes((4, 5, 6), ((0, 2), (0, 2), (0, 2)))
SCORES = ("volume_similarity", "lesion_precision", "lesion_recall", "lesion_f1")


@pytest.mark.parametrize(
    ("prediction", "truth", "expected", "error"),
    [
        (NOTHING, NOTHING, (None, None, None, None), 0.0),
        (NOTHING, LESION, (0.0, 0.0, 0.0, 0.0), 8.0),
        (LESION, NOTHING, (0.0, 0.0, None, 0.0), 8.0),
        (LESION, LESION, (1.0, 1.0, 1.0, 1.0), 0.0),
        (~LESION & (np.arange(6) > 3), LESION, (1 - 32 / 48, 0.0, 0.0, 0.0), 32.0),
    ],
)
def test_policy_of_empty_masks(prediction, truth, expected, error):
    scores = row(prediction, truth)
    assert tuple(scores[name] for name in SCORES) == pytest.approx(expected)
    assert scores["volume_error"] == error


def test_ignored_voxels_belong_to_no_lesion_and_no_volume():
    truth = LESION.astype(np.uint8)
    truth[2:] = 255
    (scores,) = case_metrics(np.ones((4, 5, 6), np.uint8), truth, TUMOUR, suite="volume", spacing=(10, 10, 10))
    assert (scores["true_ml"], scores["predicted_ml"]) == (8, 60)
    all_ignored = np.full((4, 5, 6), 255, np.uint8)
    (scores,) = case_metrics(np.ones((4, 5, 6), np.uint8), all_ignored, TUMOUR, suite="volume", spacing=(10, 10, 10))
    assert set(scores.values()) == {None}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.02, 0.1, 0.3]))
def test_finding_less_improves_no_score(seed, density):
    generator = np.random.default_rng(seed)
    truth, prediction = generator.random((2, 5, 6, 7)) < density
    hit, miss = row(prediction, truth), row(np.zeros_like(truth), truth)
    silent, alarm = row(np.zeros_like(truth), np.zeros_like(truth)), row(prediction, np.zeros_like(truth))
    for name in SCORES:
        if truth.any():
            assert miss[name] == 0.0
            assert hit[name] >= 0
        assert silent[name] is None
        assert alarm[name] in (None, 0.0)
    assert alarm["volume_error"] >= silent["volume_error"] == 0


def test_many_lesions_take_little_memory():
    generator = np.random.default_rng(0)
    truth = np.zeros((60, 60, 60), bool)
    truth[::3, ::3, ::3] = generator.random((20, 20, 20)) < 0.9
    lesions = find_lesions(truth, truth)
    assert len(lesions.true) > 7000
    assert len(match_lesions(lesions)) == len(lesions.true)  # a table of all pairs would take 400 MB
    assert lesion_measures(lesions, 0.001)["lesion_f1"] == 1


def head(case, dice, true_ml, predicted_ml, **lesions):
    counts = dict.fromkeys(DETAILS, 0.0) | lesions
    return {"case": case, "class": "tumour", "dice": dice} | counts | {"true_ml": true_ml, "predicted_ml": predicted_ml}


def test_patients_and_lesions_pooled():
    rows = [
        head("found", 0.8, 10.0, 9.0, true_large=1, found_large=1, true_small=1),
        head("found barely", 0.25, 3.0, 9.0, true_large=1, found_large=1),
        head("beside it", 0.1, 2.0, 1.0, true_small=1, false_small=1),
        head("missed", 0.0, 2.0, 0.0, true_small=1),
        head("healthy", "", 0.0, 0.0),
        head("healthy, false alarm", 0.0, 0.0, 5.0, false_large=1),
    ]
    of_class = detections(rows)["tumour"]
    assert of_class["patients"] == Detection(4, 2, 2)
    assert of_class["patients_small"] == Detection(2, 0, 1)
    assert of_class["patients_large"] == Detection(2, 2, 1)
    assert of_class["lesions"] == Detection(5, 2, 2)
    assert of_class["lesions_small"] == Detection(3, 0, 1)
    assert of_class["lesions_large"] == Detection(2, 2, 1)
    assert (of_class["patients"].precision, of_class["patients"].recall, of_class["patients"].f1) == (0.5, 0.5, 0.5)
    assert detections(rows, dice=0.26)["tumour"]["patients"].found == 1
    as_text = [{key: str(value) for key, value in entry.items()} for entry in rows]
    assert detections(as_text) == detections(rows), "as cases.csv holds it"
    assert math.isnan(Detection().precision)
    assert detections([{"case": "a", "class": "tumour", "dice": 1.0}]) == {}, "no volumes were scored"


def test_the_metric_of_a_data_set_holds_volumes_and_lesions():
    metric = SegmentationMetrics(TUMOUR, "volume")
    truth = LESION.astype(np.uint8)
    for number, prediction in enumerate((truth, np.zeros_like(truth), np.roll(truth, 1, axis=2))):
        metric.update(f"head {number}", prediction, truth, spacing=(10, 10, 10), group="one")
    result, rows = metric.compute(), metric.rows()
    assert result["tumour/lesion_f1"] == pytest.approx(2 / 3)
    assert result["tumour/volume_error"] == pytest.approx(8 / 3)
    assert [entry["true_ml"] for entry in rows] == [8, 8, 8]
    assert detections(rows)["tumour"]["patients"] == Detection(3, 2, 0)
    assert "tumour/true_ml" not in result, "no score, so no mean"


@pytest.mark.parametrize(("shape", "spacing"), [((4, 5), (1.0, 1.0)), ((4, 5, 6), None), ((4, 5, 6), (1.0, 1.0))])
def test_volumes_need_three_axes_and_a_spacing(shape, spacing):
    mask = np.ones(shape, np.uint8)
    with pytest.raises(ValueError, match="'volume' is for volumes"):
        case_metrics(mask, mask, TUMOUR, suite="volume", spacing=spacing)


@pytest.mark.parametrize("values", [{"iou": -0.1}, {"iou": 1.1}, {"minimum_ml": -1}, {"large_ml": 0}])
def test_rules_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError, match="needs 0 <= iou <= 1"):
        LesionRule(**values)
