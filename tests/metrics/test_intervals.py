import math

import numpy as np
import pytest

from visattn.metrics import bootstrap_interval, summarise


def test_equal_values_have_an_interval_of_no_width():
    assert bootstrap_interval([0.5] * 10) == (0.5, 0.5)


def test_undefined_values_change_nothing():
    values = np.random.default_rng(0).random(20).tolist()
    assert bootstrap_interval([*values, None, math.nan]) == bootstrap_interval(values)


def test_repeatable_and_seeded():
    values = np.random.default_rng(0).random(20)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values, seed=1) != bootstrap_interval(values)


def test_chunks_do_not_change_the_draws(monkeypatch):
    values, groups = np.random.default_rng(0).random(60), [index // 3 for index in range(60)]
    expected = bootstrap_interval(values, groups)
    monkeypatch.setattr("visattn.metrics.intervals._CHUNK", 100)
    assert bootstrap_interval(values, groups) == expected


def test_near_the_normal_interval_for_many_cases():
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values, n=20000)
    half = 1.96 * values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_copies_of_a_case_in_one_group_add_no_certainty():
    values = np.random.default_rng(2).random(15)
    alone = bootstrap_interval(values, range(15))
    copied = bootstrap_interval(np.repeat(values, 8), np.repeat(range(15), 8))
    assert copied == pytest.approx(alone)
    low, high = bootstrap_interval(np.repeat(values, 8))  # what ignoring the groups would claim
    assert high - low < 0.5 * (alone[1] - alone[0])


@pytest.mark.parametrize("groups", [8, 25])
def test_coverage_with_few_unequal_groups(groups):
    generator = np.random.default_rng(3)
    covered = plain = 0
    for _ in range(600):
        sizes = generator.integers(1, 7, groups)
        values = np.repeat(generator.normal(size=groups), sizes) + 0.3 * generator.normal(size=sizes.sum())
        labels = np.repeat(np.arange(groups), sizes)
        low, high = bootstrap_interval(values, labels, n=500)
        covered += low <= 0 <= high
        low, high = bootstrap_interval(values, n=500)
        plain += low <= 0 <= high
    assert 0.90 <= covered / 600 <= 0.98
    assert plain / 600 < 0.85  # without groups


@pytest.mark.parametrize("values", [[], [0.5], [None, 0.3]])
def test_one_group_has_no_interval(values):
    assert all(math.isnan(end) for end in bootstrap_interval(values))
    assert all(math.isnan(end) for end in bootstrap_interval([*values, 0.2], ["a"] * (len(values) + 1)))


def test_refused():
    with pytest.raises(ValueError, match="3 values need as many groups, got 2"):
        bootstrap_interval([1, 2, 3], ["a", "b"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        bootstrap_interval([1, 2, 3], level=95)


def test_summary_of_a_table_as_read_from_a_file():
    rows = [
        {"case": "a", "group": "p1", "class": "liver", "split": "val", "dice": "0.8", "hd95": "3"},
        {"case": "a", "group": "p1", "class": "tumour", "split": "val", "dice": "", "hd95": ""},
        {"case": "b", "group": "p2", "class": "liver", "split": "val", "dice": "0.6", "hd95": "5"},
        {"case": "b", "group": "p2", "class": "tumour", "split": "val", "dice": "0.1", "hd95": "7"},
        {"case": "c", "group": "", "class": "liver", "split": "val", "dice": "0.7", "hd95": "4"},
        {"case": "c", "group": "", "class": "tumour", "split": "val", "dice": "0.3", "hd95": "9"},
    ]
    found = {(entry.name, entry.metric): entry for entry in summarise(rows)}
    assert list(found) == [(name, metric) for metric in ("dice", "hd95") for name in ("liver", "tumour", "mean")]
    liver, tumour, both = (found[name, "dice"] for name in ("liver", "tumour", "mean"))
    assert (liver.mean, liver.cases, liver.undefined) == (pytest.approx(0.7), 3, 0)
    assert (tumour.mean, tumour.cases, tumour.undefined) == (pytest.approx(0.2), 2, 1)
    assert (both.mean, both.cases, both.undefined) == (pytest.approx(0.45), 5, 1)
    assert (liver.low, liver.high) == bootstrap_interval([0.8, 0.6, 0.7], ["p1", "p2", "c"])
    assert all(entry.low < entry.mean < entry.high for entry in (liver, both))


def test_summary_of_nothing():
    assert summarise([]) == []
    (only,) = summarise([{"case": "a", "class": "polyp", "dice": None}])
    assert all(math.isnan(number) for number in (only.mean, only.low, only.high))
    assert (only.cases, only.undefined) == (0, 1)


def test_summary_refuses_a_table_with_holes():
    row = {"case": "a", "class": "liver", "dice": 0.5}
    with pytest.raises(ValueError, match="case 'a' has class 'liver' twice"):
        summarise([row, row])
    with pytest.raises(ValueError, match="case 'b' has the classes"):
        summarise([row, {"case": "b", "class": "tumour", "dice": 0.5}])
