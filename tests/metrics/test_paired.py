import itertools
import math

import numpy as np
import pytest

from visattn.metrics import bootstrap_interval
from visattn.metrics.paired import (
    EXACT_GROUPS,
    compare_tables,
    gains,
    holm,
    pair_up,
    sign_flip,
    smallest_p,
)
from visattn.metrics.table import CaseTable


def table(metrics, groups=None, classes=("polyp",)):
    """`metrics`: name to (cases,) or (cases, classes)."""
    values = {name: np.asarray(column, float).reshape(-1, len(classes)) for name, column in metrics.items()}
    count = len(next(iter(values.values())))
    groups = [f"g{number}" for number in range(count)] if groups is None else groups
    cases = tuple((str(group), f"c{number}") for number, group in enumerate(groups))
    return CaseTable(cases, tuple(classes), values)


def only(baseline, run, **more):
    ((entry,),) = compare_tables(baseline, [run], **more)
    return entry


def same(left, right):
    return left == right or (math.isnan(left) and math.isnan(right))


# --- the numbers


def test_a_difference_that_is_known():
    baseline = table({"dice": [0.5, 0.6, 0.7, 0.8]})
    run = table({"dice": [0.6, 0.6, 0.9, 0.7]})
    entry = only(baseline, run)
    assert (entry.name, entry.metric) == ("polyp", "dice")
    assert (entry.baseline_mean, entry.run_mean, entry.difference) == pytest.approx((0.65, 0.7, 0.05))
    assert (entry.wins, entry.ties, entry.losses) == (2, 1, 1)
    assert (entry.pairs, entry.filled, entry.undefined, entry.groups) == (4, 0, 0, 4)
    assert (entry.low, entry.high) == pytest.approx(bootstrap_interval([0.1, 0.0, 0.2, -0.1]))
    # 0.1, 0.2, -0.1 with all signs: sums of at least 0.2 in size in 6 of 8 cases
    assert entry.p == entry.p_holm == 0.75


def test_a_constant_difference_has_an_interval_of_no_width():
    values = np.random.default_rng(0).random(12)
    entry = only(table({"dice": values}), table({"dice": values + 0.125}))
    assert (entry.difference, entry.low, entry.high) == pytest.approx((0.125, 0.125, 0.125))
    assert entry.p == 2 / 2**12 == smallest_p(12)
    assert (entry.wins, entry.ties, entry.losses) == (12, 0, 0)


def test_less_is_better_for_distances():
    baseline, run = table({"dice": [0.5, 0.6, 0.7], "hd95": [9, 8, 7]}), table({"dice": [0.6] * 3, "hd95": [5, 9, 7]})
    ((dice, hd95),) = compare_tables(baseline, [run])
    assert hd95.difference == pytest.approx(-1)
    assert (hd95.wins, hd95.ties, hd95.losses) == (1, 1, 1)
    assert (dice.wins, dice.ties, dice.losses) == (1, 1, 1)
    assert gains(baseline, run, "hd95").tolist() == [4, -1, 0]


def test_identical_runs_do_not_differ():
    generator = np.random.default_rng(1)
    values = {"dice": generator.random((30, 2)), "fpr_empty": np.full((30, 2), math.nan)}
    values["dice"][3, 1] = math.nan
    baseline = table(values, groups=[number // 3 for number in range(30)], classes=("rim", "core"))
    (found,) = compare_tables(baseline, [baseline])
    assert [(entry.metric, entry.name) for entry in found] == list(
        itertools.product(["dice", "fpr_empty"], ["rim", "core", "mean"])
    )
    for entry in found[:3]:
        assert (entry.difference, entry.low, entry.high, entry.p, entry.p_holm) == (0, 0, 0, 1, 1)
        assert (entry.wins, entry.losses) == (0, 0)
    assert [entry.ties for entry in found[:3]] == [30, 29, 30]
    for entry in found[3:]:
        assert entry.pairs == entry.family == 0
        assert all(math.isnan(x) for x in (entry.difference, entry.low, entry.high, entry.p, entry.p_holm))


def test_swapping_the_runs_negates_everything():
    generator = np.random.default_rng(2)
    groups = generator.integers(0, 9, 40)
    values = [generator.random((40, 2)) for _ in range(2)]
    for array in values:
        array[generator.random((40, 2)) < 0.15] = math.nan
    one, two = (table({"dice": array, "hd95_rel": array}, groups, ("rim", "core")) for array in values)
    (there,), (back,) = compare_tables(one, [two], n=500), compare_tables(two, [one], n=500)
    for entry, mirror in zip(there, back, strict=True):
        assert entry.difference == pytest.approx(-mirror.difference)
        assert (entry.low, entry.high) == pytest.approx((-mirror.high, -mirror.low))
        assert (entry.baseline_mean, entry.run_mean) == (mirror.run_mean, mirror.baseline_mean)
        assert (entry.wins, entry.losses, entry.ties) == (mirror.losses, mirror.wins, mirror.ties)
        assert (entry.p, entry.p_holm) == (mirror.p, mirror.p_holm)
        assert entry.run_mean - entry.baseline_mean == pytest.approx(entry.difference)
    dice, distance = there[0], there[3]
    assert (dice.difference, dice.p) != (distance.difference, distance.p), "filled with 1 and with 0"


def test_order_of_cases_and_classes_does_not_matter():
    generator = np.random.default_rng(3)
    one, two = (
        table({"dice": generator.random((20, 2))}, [n // 2 for n in range(20)], ("rim", "core")) for _ in range(2)
    )
    order = generator.permutation(20)
    mixed = CaseTable(tuple(two.cases[i] for i in order), ("core", "rim"), {"dice": two.values["dice"][order][:, ::-1]})
    assert compare_tables(one, [mixed]) == compare_tables(one, [two])


def test_other_cases_are_refused():
    with pytest.raises(ValueError, match="different cases"):
        compare_tables(table({"dice": [0.1, 0.2]}), [table({"dice": [0.1]})])
    with pytest.raises(ValueError, match="different cases"):
        compare_tables(table({"dice": [0.1]}), [table({"dice": [0.1]}, groups=["other"])])


def test_only_measures_that_both_have():
    one, two = table({"dice": [0.1, 0.2], "iou": [0.1, 0.2]}), table({"iou": [0.1, 0.2], "nsd": [0.1, 0.2]})
    assert only(one, two).metric == "iou"


# --- what is undefined


def test_a_false_alarm_is_not_lost_because_the_other_run_is_undefined():
    """On two empty images run B is right once, where A is wrong, and wrong once, where A is right."""
    nan = math.nan
    baseline = table({"dice": [0.8, 0.8, nan, 0.0, nan], "fpr_empty": [nan, nan, 0, 1, 0]})
    run = table({"dice": [0.8, 0.9, 0.0, nan, nan], "fpr_empty": [nan, nan, 1, 0, 0]})
    ((dice, empty),) = compare_tables(baseline, [run])
    assert (dice.pairs, dice.filled, dice.undefined) == (4, 2, 1)
    assert dice.difference == pytest.approx((0 + 0.1 - 1 + 1) / 4)
    assert (dice.wins, dice.ties, dice.losses) == (2, 1, 1)
    assert (dice.baseline_mean, dice.run_mean) == pytest.approx((2.6 / 4, 2.7 / 4))
    assert (empty.difference, empty.pairs, empty.undefined) == (0, 3, 2)
    assert (empty.wins, empty.ties, empty.losses) == (1, 1, 1)


def test_one_more_false_alarm_never_helps():
    generator = np.random.default_rng(4)
    for metric in ("dice", "hd95_rel", "mae"):
        scores = generator.random((2, 10))
        scores[:, 6:] = math.nan  # images without the class, which both leave empty
        before = only(table({metric: scores[0]}), table({metric: scores[1]}))
        worst = 0.0 if metric == "dice" else 1.0
        scores[1, 7] = worst
        after = only(table({metric: scores[0]}), table({metric: scores[1]}))
        sign = 1 if metric == "dice" else -1
        # A mean of more pairs may come nearer to 0, but never by more than the pair itself brings.
        assert sign * after.difference * after.pairs == pytest.approx(sign * before.difference * before.pairs - 1)
        assert after.losses == before.losses + 1


def test_pairs_take_the_best_value_of_the_measure():
    nan = math.nan
    first, second = pair_up(np.array([nan, 0.2, nan]), np.array([0.5, nan, nan]), "mae")
    assert first.tolist()[:2] == [0.0, 0.2]
    assert second.tolist()[:2] == [0.5, 0.0]
    assert np.isnan(first[2])
    assert np.isnan(second[2])


def test_the_mean_of_classes_weighs_classes_equally():
    nan = math.nan
    one = table({"dice": [[0.5, nan], [0.5, nan], [0.5, 0.2]]}, classes=("rim", "core"))
    two = table({"dice": [[0.6, nan], [0.6, nan], [0.6, 0.0]]}, classes=("rim", "core"))
    ((rim, core, mean),) = compare_tables(one, [two])
    assert (rim.difference, core.difference) == pytest.approx((0.1, -0.2))
    assert mean.difference == pytest.approx(-0.05)
    assert (mean.pairs, mean.undefined, mean.wins, mean.losses) == (4, 2, 2, 1)
    # Contributions 1/60, 1/60 and 1/60 - 6/60 to the sum of -3/60: no choice of signs comes nearer to 0
    assert mean.p == 1
    assert (core.groups, math.isnan(core.p), math.isnan(core.low)) == (1, True, True)
    two.values["dice"][2, 1] = 0.16
    # 1/60, 1/60 and 1/60 - 1.2/60: two of four choices, up to the sign of all, are as far from 0
    assert compare_tables(one, [two])[0][2].p == 0.5


# --- groups


def test_groups_are_flipped_and_drawn_as_one():
    """Ten frames of each of four videos: four observations, not forty."""
    generator = np.random.default_rng(5)
    groups = np.repeat(range(4), 10)
    baseline = generator.random(40) * 0.2 + 0.4
    run = baseline + 0.1 + generator.normal(0, 0.01, 40)
    entry = only(table({"dice": baseline}, groups), table({"dice": run}, groups))
    assert entry.p == smallest_p(4) == 0.125
    alone = only(table({"dice": baseline}), table({"dice": run}))
    assert alone.p < 0.001
    assert (entry.low, entry.high) == bootstrap_interval(run - baseline, groups)
    assert (entry.groups, alone.groups, entry.pairs) == (4, 40, 40)


def test_one_group_gives_neither_interval_nor_p():
    entry = only(table({"dice": [0.1, 0.2]}, ["a", "a"]), table({"dice": [0.2, 0.3]}, ["a", "a"]))
    assert entry.difference == pytest.approx(0.1)
    assert entry.family == 0
    assert all(math.isnan(x) for x in (entry.low, entry.high, entry.p, entry.p_holm))


# --- sign-flip test


def brute_force(parts):
    observed = abs(math.fsum(parts))
    sums = [
        abs(math.fsum(s * part for s, part in zip(signs, parts, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(parts))
    ]
    return sum(value >= observed - 1e-12 for value in sums) / len(sums)


@pytest.mark.parametrize("count", [2, 3, 5, 8, 11])
def test_sign_flip_equals_brute_force(count):
    generator = np.random.default_rng(count)
    for _ in range(5):
        parts = generator.normal(0.3, 1, count)
        assert sign_flip(parts) == brute_force(parts)
    rounded = generator.integers(-3, 4, count) / 10  # ties among sums, and zeros
    assert sign_flip(rounded) == brute_force(rounded)


def test_random_signs_come_near_the_exact_p(monkeypatch):
    generator = np.random.default_rng(6)
    for shift in (0.1, 0.4, 0.8):
        parts = generator.normal(shift, 1, 16)
        exact = sign_flip(parts)
        with monkeypatch.context() as patch:
            patch.setattr("visattn.metrics.paired.EXACT_GROUPS", 2)
            drawn = sign_flip(parts)
            assert drawn == sign_flip(parts), "seeded"
            patch.setattr("visattn.metrics.paired._CHUNK", 1000)
            assert drawn == sign_flip(parts), "chunks do not change the draws"
        assert drawn != exact
        assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 10_000))


def test_a_p_value_is_never_zero():
    assert sign_flip(np.ones(EXACT_GROUPS)) == smallest_p(EXACT_GROUPS) == 2 / 2**EXACT_GROUPS
    assert sign_flip(np.ones(EXACT_GROUPS + 1)) >= smallest_p(EXACT_GROUPS + 1) == 1 / 10_001
    assert sign_flip(np.ones(60)) == 1 / 10_001


def test_what_cancels_within_a_group_is_no_difference():
    groups = np.repeat(range(5), 3)
    baseline, run = np.tile([0.1, 0.2, 0.3], 5), np.tile([0.3, 0.1, 0.2], 5)
    entry = only(table({"dice": baseline}, groups), table({"dice": run}, groups))
    assert entry.difference == pytest.approx(0, abs=1e-12)
    assert entry.p == 1


# --- Holm


def test_holm_by_hand():
    # 4 x 0.01; 3 x 0.02; 2 x 0.03, then 0.04, which may not fall below the one before
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.4, 0.5, 0.01]) == pytest.approx([0.8, 0.8, 0.03])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    left, none, right = holm([0.01, math.nan, 0.04])
    assert (left, right) == pytest.approx((0.02, 0.04))
    assert math.isnan(none)


def test_the_family_is_all_runs_and_classes_of_one_measure():
    generator = np.random.default_rng(7)
    shape = (10, 2)
    tables = [
        table({"dice": generator.random(shape) + shift, "hd95": generator.random(shape)}, classes=("rim", "core"))
        for shift in (0, 0.3, 0.05)
    ]
    results = compare_tables(tables[0], tables[1:])
    for metric in ("dice", "hd95"):
        entries = [entry for found in results for entry in found if entry.metric == metric]
        assert [entry.family for entry in entries] == [6] * 6
        assert [entry.p_holm for entry in entries] == holm([entry.p for entry in entries])


# --- a table from rows


def test_rows_become_a_table():
    rows = [
        {"case": "b", "group": "", "class": "rim", "hd95": "3.5", "dice": "0.5", "split": "val"},
        {"case": "b", "group": "", "class": "core", "hd95": "", "dice": None, "split": "val"},
        {"case": "a", "group": "p", "class": "core", "hd95": 1, "dice": "1", "split": "val"},
        {"case": "a", "group": "p", "class": "rim", "hd95": 2, "dice": "0", "split": "val"},
    ]
    found = CaseTable.from_rows(rows)
    assert (found.cases, found.classes, list(found.values)) == (
        (("b", "b"), ("p", "a")),
        ("rim", "core"),
        ["dice", "hd95"],
    )
    np.testing.assert_array_equal(found.values["hd95"], [[3.5, math.nan], [2, 1]])


# --- simulation


def simulate(generator, groups):
    """Paired scores of groups of unequal size: skewed effects of group and case on the difference, true mean 0.05."""
    sizes = generator.integers(1, 9, groups)
    labels = np.repeat(np.arange(groups), sizes)
    effect = 0.05 * (generator.exponential(size=groups) - 1)
    noise = 0.05 * generator.standard_t(5, size=sizes.sum())
    baseline = generator.beta(8, 2, sizes.sum())
    return baseline, baseline + 0.05 + effect[labels] + noise, labels


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "least"), [(10, 0.88), (20, 0.88), (50, 0.89)])
def test_coverage_and_error_rate(groups, least):
    """How often the interval holds the truth, and how often p < 0.05 where there is no difference."""
    generator = np.random.default_rng(groups)
    covered = ignoring = errors = 0
    runs = 400
    for number in range(runs):
        baseline, run, labels = simulate(generator, groups)
        entry = only(table({"dice": baseline}, labels), table({"dice": run}, labels), n=1000, seed=number)
        covered += entry.low <= 0.05 <= entry.high
        low, high = bootstrap_interval(run - baseline, n=1000, seed=number)
        ignoring += low <= 0.05 <= high
        # Without a difference the signs of whole groups are arbitrary.
        flips = generator.choice([-1, 1], groups)[labels]
        null = only(table({"dice": np.zeros(len(run))}, labels), table({"dice": flips * (run - baseline)}, labels), n=1)
        errors += null.p < 0.05
    shares = [f"{count / runs:.3f}" for count in (covered, ignoring, errors)]
    print(f"{groups} groups: covered {shares[0]}, ignoring groups {shares[1]}, p < 0.05 without difference {shares[2]}")
    assert least <= covered / runs <= 0.985
    assert ignoring / runs < covered / runs - 0.05
    assert errors / runs <= 0.08
