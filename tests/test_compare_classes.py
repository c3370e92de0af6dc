"""Runs of classifiers, compared: differences with intervals and p values, and what is refused."""

import json
import math

import numpy as np
import pytest

from visattn.class_labels import ClassLabels
from visattn.class_scored import case_rows
from visattn.cli import main
from visattn.metrics.classes import ALL, ClassTable
from visattn.metrics.paired_classes import compare_class_tables
from visattn.scored import Input, write_cases, write_inputs, write_summary


def answers(seed, truth, classes=2, strength=1.5, groups=(), multi_label=False):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(truth), classes))
    if multi_label:
        return 1 / (1 + np.exp(-(logits + strength * (2 * truth - 1))))
    logits[np.arange(len(truth)), truth] += strength
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def tables(n=40, classes=2, strengths=(0.5, 2.0), groups=None):
    truth = np.random.default_rng(9).integers(0, classes, n)
    names, groups = tuple("abcdef"[:classes]), tuple(groups or map(str, range(n)))
    return [ClassTable(names, answers(i, truth, classes, s), truth, groups) for i, s in enumerate(strengths)]


def entry(found, metric, name=ALL):
    return next(one for one in found if (one.metric, one.name) == (metric, name))


def auc(scores, positive):
    pairs = scores[positive][:, None] - scores[~positive][None]
    return float(np.mean((pairs > 0) + 0.5 * (pairs == 0)))


def test_differences_and_intervals_are_those_of_a_slow_loop():
    groups = [f"g{i // 2}" for i in range(40)]
    baseline, run = tables(groups=groups)
    # The runs resemble each other, as runs do: draws that were not paired would have far wider intervals.
    run = ClassTable(run.names, 0.8 * baseline.probabilities + 0.2 * run.probabilities, run.truth, run.groups)
    (found,) = compare_class_tables(baseline, [run])
    positive = baseline.truth == 1
    wanted = auc(run.probabilities[:, 1], positive) - auc(baseline.probabilities[:, 1], positive)
    one = entry(found, "auc")
    assert one.difference == pytest.approx(wanted, abs=1e-12)
    assert one.run_mean == pytest.approx(auc(run.probabilities[:, 1], positive), abs=1e-12)
    rng, draws = np.random.default_rng(5), []
    for _ in range(2000):
        rows = np.concatenate([[2 * g, 2 * g + 1] for g in rng.integers(0, 20, 20)])
        true = positive[rows]
        draws.append(auc(run.probabilities[rows, 1], true) - auc(baseline.probabilities[rows, 1], true))
    assert np.std(draws) == pytest.approx((one.high - one.low) / (2 * 2.15), rel=0.12)  # moved outwards for 20 groups
    assert one.low < wanted < one.high
    assert {e.metric for e in found if e.name == ALL} == {"auc", "accuracy", "balanced_accuracy", "ece"}


def test_the_p_value_of_accuracy_is_mcnemars():
    baseline, run = tables(n=300)
    one = entry(compare_class_tables(baseline, [run])[0], "accuracy")
    b, c = one.wins, one.losses
    assert one.wins + one.ties + one.losses == 300
    assert (b, c) == (int((run.correct > baseline.correct).sum()), int((run.correct < baseline.correct).sum()))
    exact = min(1.0, 2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))
    assert one.p == pytest.approx(exact, abs=0.01)


def test_few_groups_are_tried_out_and_equal_runs_do_not_differ():
    baseline, run = tables(n=12, strengths=(0.5, 1.0), groups=[f"g{i // 2}" for i in range(12)])
    one = entry(compare_class_tables(baseline, [run])[0], "auc")
    differences = []
    for signs in range(64):
        swap = np.array([(signs >> (i // 2)) & 1 for i in range(12)], bool)[:, None]
        a = np.where(swap, run.probabilities, baseline.probabilities)[:, 1]
        b = np.where(swap, baseline.probabilities, run.probabilities)[:, 1]
        differences.append(auc(b, baseline.truth == 1) - auc(a, baseline.truth == 1))
    assert one.p == pytest.approx(np.mean(np.abs(differences) >= abs(one.difference) - 1e-9))
    assert 0.1 < one.p < 0.9, "or this would not tell much"
    same = entry(compare_class_tables(baseline, [baseline])[0], "auc")
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    alone = entry(compare_class_tables(*[tables(groups=["g"] * 40)[0], [tables(groups=["g"] * 40)[1]]])[0], "auc")
    assert math.isnan(alone.p)
    assert math.isnan(alone.low)


def test_p_values_are_uniform_where_there_is_no_difference():
    p = [
        entry(compare_class_tables(*(lambda t: (t[0], [t[1]]))(_null(seed)), n=100)[0], "auc").p for seed in range(120)
    ]
    assert 0.01 <= np.mean(np.array(p) < 0.1) <= 0.19  # 0.1 but for chance


def _null(seed):
    truth = np.random.default_rng(seed).integers(0, 2, 10)
    truth[:2] = 0, 1
    return [ClassTable(("a", "b"), answers(1000 * i + seed, truth), truth, tuple(map(str, range(10)))) for i in (1, 2)]


def test_holm_counts_all_runs_and_classes_of_a_measure():
    baseline, one, two = tables(classes=3, strengths=(0.5, 1.5, 2.0))
    found = compare_class_tables(baseline, [one, two])
    assert {e.family for e in found[0] if e.metric == "auc"} == {8}, "2 runs x (3 classes and all)"
    assert {e.family for e in found[0] if e.metric == "recall"} == {6}
    assert all(e.p_holm >= e.p for each in found for e in each)


def scored(folder, table, split="test", names=None, **labels):
    names = names or [f"c{i}" for i in range(len(table.truth))]
    keys = list(zip(names, table.groups, strict=True))
    folder.mkdir(parents=True)
    write_cases(folder / "cases.csv", case_rows(keys, table), split)
    config = ClassLabels(table.names, table.multi_label).to_config() | labels
    write_summary(folder, {"task": "classification", "labels": config, "data": {"description": "phantom"}})
    write_inputs(folder, [Input(case, group, "phantom", None, None, None) for case, group in keys])
    return folder


def test_the_command_prints_and_writes(tmp_path, capsys):
    baseline, run = tables(n=60)
    first = scored(tmp_path / "first", baseline)
    order = np.random.default_rng(0).permutation(60)
    mixed = ClassTable(run.names, run.probabilities[order], run.truth[order], tuple(run.groups[i] for i in order))
    second = scored(tmp_path / "<b>second", mixed, names=[f"c{i}" for i in order])
    assert main(["compare", str(first), str(second), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "balanced_accuracy" in text
    assert "permutation test that swaps the answers" in text
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["task"] == "classification"
    one = next(e for e in content["differences"] if (e["metric"], e["class"]) == ("auc", "all"))
    wanted = entry(compare_class_tables(baseline, [run])[0], "auc")
    assert one["difference"] == pytest.approx(wanted.difference, abs=1e-4), "matched by name, whatever the order"
    assert one["p"] == pytest.approx(wanted.p, abs=0.02)
    largest = content["largest"][0]
    gains = run.probabilities[np.arange(60), run.truth] - baseline.probabilities[np.arange(60), run.truth]
    assert abs(largest["gain"]) == pytest.approx(np.abs(gains).max(), abs=1e-4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;second" in page
    assert "<b>second" not in page
    assert "Cases that differ most" in page
    assert "Synthetic images" in page
    assert (tmp_path / "out" / "plot.png").stat().st_size > 0
    assert main(["compare", str(first), str(second), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["differences"] == content["differences"]


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    baseline, run = tables(n=20)
    first = scored(tmp_path / "first", baseline)

    def refused(folder, *words):
        assert main(["compare", str(first), str(folder)]) == 2
        text = capsys.readouterr().err
        assert all(word in text for word in words), text

    other = ClassTable(("a", "z"), run.probabilities, run.truth, run.groups)
    refused(scored(tmp_path / "classes", other), "different classes", "z")
    truth = run.truth.copy()
    truth[3] = 1 - truth[3]
    refused(
        scored(tmp_path / "truth", ClassTable(run.names, run.probabilities, truth, run.groups)),
        "true classes of 1 cases differ",
        "c3",
    )
    refused(scored(tmp_path / "split", run, split="val"), "different splits")
    refused(scored(tmp_path / "names", run, names=[f"x{i}" for i in range(20)]), "different cases")
    segmented = tmp_path / "segmented"
    segmented.mkdir()
    write_cases(segmented / "cases.csv", [{"case": "c0", "group": "0", "class": "polyp", "dice": 0.5}], "test")
    write_summary(segmented, {"labels": {"labels": {"background": 0, "polyp": 255}}})
    refused(segmented, "is a classification and", "a segmentation")


def test_tables_of_other_cases_are_refused():
    baseline, run = tables()
    with pytest.raises(ValueError, match="different cases"):
        compare_class_tables(baseline, [ClassTable(run.names, run.probabilities, 1 - run.truth, run.groups)])


def test_several_labels(tmp_path):
    truth = np.random.default_rng(1).integers(0, 2, (50, 3))
    both = [
        ClassTable(("a", "b", "c"), answers(i, truth, 3, s, multi_label=True), truth, tuple(map(str, range(50))))
        for i, s in enumerate((0.3, 3.0))
    ]
    (found,) = compare_class_tables(both[0], [both[1]])
    assert entry(found, "auc").difference > 0.1
    assert entry(found, "auc").p < 0.01
    assert entry(found, "auc", "b").difference == pytest.approx(
        auc(both[1].probabilities[:, 1], truth[:, 1] == 1) - auc(both[0].probabilities[:, 1], truth[:, 1] == 1)
    )
    folders = [scored(tmp_path / name, table) for name, table in zip("xy", both, strict=True)]
    assert main(["compare", *map(str, folders)]) == 0
