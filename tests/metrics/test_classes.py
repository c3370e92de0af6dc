"""AUC, accuracy and their kin against scikit-learn and against definitions written out."""

import numpy as np
import pytest
import torch

from visattn.class_labels import ClassLabels
from visattn.class_scored import case_rows, read_labels, read_table
from visattn.errors import UserError
from visattn.metrics.classes import ClassTable
from visattn.metrics.classification import ClassificationMetrics

try:
    import sklearn.metrics as sk
except ImportError:  # comes with a package of the extra dev; loops without it are below
    sk = None
with_sklearn = pytest.mark.skipif(sk is None, reason="needs scikit-learn")


def medmnist_auc(truth, probabilities, kind):
    """As the medmnist evaluator computes it, with scikit-learn."""
    if kind == "multi-label":
        return np.mean([sk.roc_auc_score(truth[:, k], probabilities[:, k]) for k in range(probabilities.shape[1])])
    if kind == "binary":
        return sk.roc_auc_score(truth, probabilities[:, -1])
    return np.mean([sk.roc_auc_score(truth == k, probabilities[:, k]) for k in range(probabilities.shape[1])])


def medmnist_accuracy(truth, probabilities, kind):
    if kind == "multi-label":
        return np.mean(
            [sk.accuracy_score(truth[:, k], probabilities[:, k] > 0.5) for k in range(probabilities.shape[1])]
        )
    if kind == "binary":
        return sk.accuracy_score(truth, probabilities[:, -1] > 0.5)
    return sk.accuracy_score(truth, probabilities.argmax(axis=1))


def pairs_won(truth, scores):
    """AUC by its definition: the share of pairs in which the positive case has the larger score, ties half."""
    positive, negative = scores[truth == 1], scores[truth == 0]
    won = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative)
    return won / (len(positive) * len(negative))


def by_definition(truth, probabilities, kind):
    """AUC and accuracy of the `medmnist` evaluator (3.0.2), in loops and without scikit-learn."""
    classes = range(probabilities.shape[1])
    if kind == "binary":
        said = [1 if row[-1] > 0.5 else 0 for row in probabilities]  # the last column alone decides
        return pairs_won(truth, probabilities[:, -1]), sum(map(int.__eq__, said, truth.tolist())) / len(truth)
    if kind == "multi-label":
        aucs = [pairs_won(truth[:, k], probabilities[:, k]) for k in classes]
        right = [
            int((row[k] > 0.5) == bool(true[k]))
            for row, true in zip(probabilities, truth, strict=True)
            for k in classes
        ]
        return sum(aucs) / len(aucs), sum(right) / len(right)
    aucs = [pairs_won((truth == k).astype(int), probabilities[:, k]) for k in classes]
    said = [max(classes, key=lambda k: (row[k], -k)) for row in probabilities]  # the first of equal ones
    return sum(aucs) / len(aucs), sum(map(int.__eq__, said, truth.tolist())) / len(truth)


def drawn(kind, seed, count=60, classes=4):
    """Truth and probabilities with many ties, some of them between classes and at 0.5."""
    rng = np.random.default_rng(seed)
    classes = 2 if kind == "binary" else classes
    if kind == "multi-label":
        truth = rng.integers(0, 2, (count, classes))
        truth[0], truth[1] = 0, 1
        return truth, np.round(np.clip(0.3 * truth + rng.uniform(0, 0.7, truth.shape), 0, 1), 1)
    truth = np.concatenate([np.arange(classes), rng.integers(0, classes, count - classes)])
    scores = np.round(rng.dirichlet(np.ones(classes), count) + 0.3 * np.eye(classes)[truth], 1)
    if kind == "binary":
        second = np.round(np.clip(scores[:, 1] / scores.sum(axis=1), 0, 1), 1)
        return truth, np.stack([1 - second, second], axis=1)
    return truth, scores / scores.sum(axis=1, keepdims=True)


def table_of(truth, probabilities, groups=()):
    names = tuple(f"class {k}" for k in range(probabilities.shape[1]))
    return ClassTable(names, probabilities, truth, tuple(groups))


@with_sklearn
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["binary", "multi-class", "multi-label"])
def test_auc_and_accuracy_are_those_of_medmnist(kind, seed):
    truth, probabilities = drawn(kind, seed)
    headline = table_of(truth, probabilities).headline()
    assert headline["auc"] == pytest.approx(medmnist_auc(truth, probabilities, kind), abs=1e-12)
    assert headline["accuracy"] == pytest.approx(medmnist_accuracy(truth, probabilities, kind), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["binary", "multi-class", "multi-label"])  # ordinal ones are scored as multi-class
def test_auc_and_accuracy_by_their_definition(kind, seed):
    truth, probabilities = drawn(kind, 10 + seed, count=40, classes=5)
    headline = table_of(truth, probabilities).headline()
    assert (headline["auc"], headline["accuracy"]) == pytest.approx(
        by_definition(truth, probabilities, kind), abs=1e-12
    )


def test_a_probability_of_one_half_is_a_no():
    even = np.array([[0.5, 0.5], [0.4, 0.6]])
    assert table_of(np.array([1, 1]), even).headline()["accuracy"] == 0.5
    assert table_of(np.array([[1, 1], [0, 1]]), even).headline()["accuracy"] == 0.5


@with_sklearn
@pytest.mark.parametrize("kind", ["binary", "multi-class"])
def test_other_measures_against_scikit_learn(kind):
    truth, probabilities = drawn(kind, 7)
    table = table_of(truth, probabilities)
    means, chosen = table.means(), table.chosen.argmax(axis=1)
    assert means["all/balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth, chosen))
    recalls = sk.recall_score(truth, chosen, average=None, zero_division=np.nan)
    precisions = sk.precision_score(truth, chosen, average=None, zero_division=np.nan)
    assert [means[f"{name}/recall"] for name in table.names] == pytest.approx(list(recalls))
    assert [means[f"{name}/precision"] for name in table.names] == pytest.approx(list(precisions), nan_ok=True)
    assert table.confusion()["counts"] == sk.confusion_matrix(truth, chosen, labels=range(len(table.names))).tolist()


@with_sklearn
def test_balanced_accuracy_and_confusion_of_several_labels():
    truth, probabilities = drawn("multi-label", 3)
    table = table_of(truth, probabilities)
    chosen = (probabilities > 0.5).astype(int)
    each = [sk.balanced_accuracy_score(truth[:, k], chosen[:, k]) for k in range(4)]
    assert table.means()["all/balanced_accuracy"] == pytest.approx(np.mean(each))
    counts = [sk.confusion_matrix(truth[:, k], chosen[:, k]).tolist() for k in range(4)]
    assert list(table.confusion()["regions"].values()) == counts


def test_calibration_error_of_the_chosen_class_by_hand():
    probabilities = np.array([[0.95, 0.05], [0.92, 0.08], [0.35, 0.65], [0.32, 0.68]])
    table = table_of(np.array([0, 1, 1, 1]), probabilities)  # 0.9 and up: half right; 0.6 and up: all right
    expected = 0.5 * abs(0.935 - 0.5) + 0.5 * abs(0.665 - 1.0)
    assert table.means()["all/ece"] == pytest.approx(expected)


@with_sklearn
def test_a_class_that_no_case_has_is_left_out_of_the_mean():
    truth, probabilities = drawn("multi-class", 1)
    keep = truth != 2
    truth, probabilities = truth[keep], probabilities[keep]
    means = table_of(truth, probabilities).means()
    assert np.isnan(means["class 2/auc"])
    others = [sk.roc_auc_score(truth == k, probabilities[:, k]) for k in (0, 1, 3)]
    assert means["all/auc"] == pytest.approx(np.mean(others))
    assert np.isnan(table_of(np.zeros(3, int), np.full((3, 2), 0.5)).headline()["auc"])


def test_weights_count_a_case_as_often_as_they_say():
    truth, probabilities = drawn("multi-class", 5)
    table, times = table_of(truth, probabilities), np.random.default_rng(0).integers(0, 4, len(truth))
    again = np.repeat(np.arange(len(truth)), times)
    repeated = table_of(truth[again], probabilities[again])
    np.testing.assert_allclose(table.statistics(times[None].astype(float))[0], list(repeated.means().values()))


@with_sklearn
def test_intervals_draw_groups_and_agree_with_a_plain_bootstrap():
    truth, probabilities = drawn("binary", 2, count=80)
    groups = [f"patient {index // 8}" for index in range(80)]
    rows, alone = (
        {entry.metric: entry for entry in table.summarise(n=400) if entry.name == "all"}
        for table in (table_of(truth, probabilities, groups), table_of(truth, probabilities))
    )
    for entry in rows.values():
        assert entry.low <= entry.mean <= entry.high
    rng, plain = np.random.default_rng(9), []
    for _ in range(400):
        index = np.concatenate([np.arange(8 * g, 8 * g + 8) for g in rng.integers(0, 10, 10)])
        if len(set(truth[index])) == 2:
            plain.append(sk.roc_auc_score(truth[index], probabilities[index, 1]))
    low, high = np.quantile(plain, [0.025, 0.975])
    assert rows["auc"].low == pytest.approx(low, abs=0.06)
    assert rows["auc"].high == pytest.approx(high, abs=0.06)
    assert rows["auc"] != alone["auc"]


@pytest.mark.parametrize("kind", ["binary", "multi-class", "multi-label"])
def test_the_table_of_cases_is_read_back(kind, tmp_path):
    from visattn.scored import read_cases, write_cases

    truth, probabilities = drawn(kind, 4)
    names = [f'normal, "{k}"' for k in range(probabilities.shape[1])]
    labels = ClassLabels.from_config(names, kind == "multi-label")
    table = ClassTable(labels.names, probabilities, truth, tuple(f"g{i // 2}" for i in range(len(truth))))
    keys = [(f"case {index}", group) for index, group in enumerate(table.groups)]
    write_cases(tmp_path / "cases.csv", case_rows(keys, table), "val")
    back = read_table(read_cases(tmp_path / "cases.csv"), labels, "cases.csv")
    np.testing.assert_array_equal(back.truth, table.truth)
    np.testing.assert_allclose(back.probabilities, table.probabilities, atol=1e-6)
    assert back.groups == table.groups
    assert read_labels({"labels": labels.to_config()}, "x") == labels


def test_what_is_no_table_of_classes_is_refused():
    labels = ClassLabels.from_config(["a", "b"])
    with pytest.raises(UserError, match="not the table"):
        read_table([{"case": "1", "group": "", "truth": "c", "p_a": "0.1", "p_b": "0.9"}], labels, "cases.csv")
    with pytest.raises(UserError, match="not the table"):
        read_table([{"case": "1", "group": "", "truth": "a", "p_a": "0.1"}], labels, "cases.csv")
    with pytest.raises(UserError, match="names no classes"):
        read_labels({"labels": {"labels": {"background": 0}}}, "summary.json")


@pytest.mark.parametrize("multi_label", [False, True])
def test_batches_and_repetitions_do_not_change_the_result(multi_label):
    kind = "multi-label" if multi_label else "multi-class"
    truth, probabilities = drawn(kind, 6)
    metric = ClassificationMetrics(ClassLabels.from_config(list("abcd"), multi_label))
    cases = [f"case {index:03d}" for index in range(len(truth))]
    given = torch.from_numpy(probabilities), torch.from_numpy(truth)
    for part in (slice(40, None), slice(0, 40), slice(0, 3)):  # the last repeats cases, with other answers
        values = given[0][part] if part.stop != 3 else 1 - given[0][part]
        metric.update(cases[part], values, given[1][part], [""] * len(cases[part]))
    keys, table = metric.table()
    assert [case for case, _ in keys] == cases
    np.testing.assert_array_equal(table.truth, truth)
    np.testing.assert_array_equal(table.probabilities, probabilities)
    assert metric.compute()["auc"] == pytest.approx(medmnist_auc(truth, probabilities, kind))


def test_probabilities_that_are_none_are_refused():
    for bad in (np.nan, -0.1, 1.2):
        with pytest.raises(ValueError, match=r"not in 0\.\.1"):
            table_of(np.array([0, 1]), np.array([[bad, 0.5], [0.5, 0.5]]))
