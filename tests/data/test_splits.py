import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data.cases import Case
from visattn.data.splits import PARTS, Split, find_groups, fold_cases, split_cases, write_splits
from visattn.errors import UserError


def make_cases(groups):
    """Cases c000, c001, ... in the groups given."""
    return [
        Case(f"c{number:03d}", Path(f"images/c{number:03d}.png"), Path(f"masks/c{number:03d}.png"), str(group), "root")
        for number, group in enumerate(groups)
    ]


GROUPED = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=8, max_size=90).filter(
    lambda cases: len({group for group, _ in cases}) >= 6
)


def names(parts):
    return {part: [case.name for case in cases] for part, cases in parts.items()}


@given(GROUPED, st.integers(0, 5), st.sampled_from([{"val": 0.1}, {"val": 0.3, "test": 0.2}, {"folds": 4, "fold": 1}]))
@settings(deadline=None)
def test_groups_never_part_and_every_case_has_one_place(grouped, seed, config):
    cases, foreground = make_cases([group for group, _ in grouped]), [{1} if filled else set() for _, filled in grouped]
    parts = split_cases(cases, foreground, Split.from_config(config), seed)
    assert tuple(parts) == PARTS
    homes = {}
    for part, members in parts.items():
        for case in members:
            assert homes.setdefault(case.group, part) == part
    assert sorted(name for members in names(parts).values() for name in members) == [case.name for case in cases]
    assert parts["train"]
    assert parts["val"]
    assert bool(parts["test"]) == ("test" in config)


@given(GROUPED, st.integers(0, 5), st.randoms())
@settings(deadline=None, max_examples=30)
def test_split_is_a_function_of_the_seed_and_not_of_the_order_of_files(grouped, seed, random):
    cases, foreground = make_cases([group for group, _ in grouped]), [{1} if filled else set() for _, filled in grouped]
    shuffled = random.sample(range(len(cases)), len(cases))
    once = split_cases(cases, foreground, Split(val=0.2, test=0.1), seed)
    again = split_cases([cases[i] for i in shuffled], [foreground[i] for i in shuffled], Split(val=0.2, test=0.1), seed)
    assert names(once) == names(again)


def test_another_seed_draws_another_split():
    cases = make_cases(range(40))
    drawn = {tuple(names(split_cases(cases, [{1}] * 40, Split(), seed))["val"]) for seed in range(8)}
    assert len(drawn) == 8


@given(GROUPED, st.integers(0, 3), st.integers(2, 5))
@settings(deadline=None, max_examples=30)
def test_folds_partition_the_cases_exactly(grouped, seed, folds):
    cases, foreground = make_cases([group for group, _ in grouped]), [{1} if filled else set() for _, filled in grouped]
    validated = Counter()
    for fold in range(folds):
        parts = names(split_cases(cases, foreground, Split(folds=folds, fold=fold), seed))
        assert sorted(parts["train"] + parts["val"]) == [case.name for case in cases]
        validated.update(parts["val"])
    assert validated == Counter(case.name for case in cases)


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.0), (0.25, 0.1), (0.5, 0.25)])
@pytest.mark.parametrize("count", [20, 101, 400])
def test_ratios_are_met_to_the_case_and_empty_images_are_shared_out(val, test, count):
    cases, foreground = make_cases(range(count)), [{1} if number % 10 else set() for number in range(count)]
    parts = split_cases(cases, foreground, Split(val=val, test=test), 0)
    for part, share in (("val", val), ("test", test)):
        assert abs(len(parts[part]) - share * count) <= 1
        empty = sum(not foreground[int(case.name[1:])] for case in parts[part])
        assert abs(empty - share * count / 10) <= 1


def test_ratio_with_groups_is_off_by_at_most_half_the_largest_group():
    sizes = [17, 3, 25, 9, 12, 30, 8, 21, 14, 11]
    cases = make_cases([group for group, size in enumerate(sizes) for _ in range(size)])
    for seed in range(20):
        parts = split_cases(cases, [{1}] * len(cases), Split(val=0.2), seed)
        assert abs(len(parts["val"]) - 0.2 * len(cases)) <= max(sizes) / 2


def test_folds_share_out_sizes_and_empty_images():
    cases, foreground = make_cases(range(60)), [{1} if number % 5 else set() for number in range(60)]
    for fold in range(4):
        val = split_cases(cases, foreground, Split(folds=4, fold=fold), 1)["val"]
        assert len(val) == 15
        assert sum(not foreground[int(case.name[1:])] for case in val) == 3


def test_groups_by_expression_and_by_table(tmp_path):
    cases = [
        Case(stem, tmp_path / f"{stem}.png", tmp_path / f"{stem}.png", stem, "r") for stem in ("p1_a", "p1_b", "p2.x_a")
    ]
    assert find_groups(cases, r"^(p\d+)") == ["p1", "p1", "p2"]
    assert find_groups(cases, None) == ["p1_a", "p1_b", "p2.x_a"]
    table = tmp_path / "patients.csv"
    table.write_text("\ufefffile,patient\np1_a.png,A\np1_b.jpg,A\np2.x_a.png,B\nother.png,C\n", encoding="utf-8")
    assert find_groups(cases, f"{table}:patient") == ["A", "A", "B"]


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("^(p[0-9]", "no regular expression"),
        ("^p[0-9]", "exactly one group"),
        ("^(q[0-9])", "2 of 2 cases are not matched.*: p1, p2"),
        ("{folder}/none.csv:patient", r"cannot read .*none.csv \(No such file or directory\)$"),
        ("nowhere/none.csv:patient", "relative paths count from where visattn is called"),
        ("{folder}/t.csv:patent", "Did you mean 'patient'"),
        ("{folder}/short.csv:patient", "1 of 2 cases are not in the first column.*: p2"),
        ("{folder}/twice.csv:patient", "'p1' into 'A' and into 'B'"),
        ("{folder}/empty.csv:patient", "no rows"),
    ],
)
def test_group_mistakes_are_explained(tmp_path, group_by, message):
    (tmp_path / "t.csv").write_text("file,patient\np1,A\np2,B\n")
    (tmp_path / "short.csv").write_text("file,patient\np1,A\n")
    (tmp_path / "twice.csv").write_text("file,patient\np1,A\np1,B\np2,B\n")
    (tmp_path / "empty.csv").write_text("file,patient\n")
    cases = [Case(stem, Path(f"{stem}.png"), Path(f"{stem}.png"), stem, "r") for stem in ("p1", "p2")]
    with pytest.raises(UserError, match=message):
        find_groups(cases, group_by.format(folder=tmp_path))


def test_written_splits_are_read_back(tmp_path):
    cases = make_cases(range(12))
    parts = split_cases(cases, [{1}] * 12, Split(val=0.25, test=0.25), 0)
    write_splits(tmp_path / "splits.json", parts)
    again = split_cases(cases, [{1}] * 12, Split(files=str(tmp_path / "splits.json")), 99)
    assert names(again) == names(parts)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot read"),
        ("[]", "must hold"),
        ({"train": ["c000"]}, "no case for val"),
        ({"train": ["c000"], "val": ["c001", "c9"]}, "1 cases that are not in the data: c9"),
        ({"train": ["c000", "c001"], "val": ["c001"]}, "c001 twice"),
        ({"train": ["c000"], "vall": ["c001"]}, "Did you mean 'val'"),
        ({"train": ["c000", "c002"], "val": ["c003"]}, "parts the group 'b' into train and val"),
        ({"train": ["c000"], "val": "c001"}, "must hold"),
    ],
)
def test_split_file_mistakes_are_explained(tmp_path, content, message):
    path = tmp_path / "splits.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        split_cases(make_cases("aabb"), [{1}] * 4, Split(files=str(path)), 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vall": 0.1}, "Did you mean 'val'"),
        ({"val": 0}, "cannot be 0"),
        ({"val": 1.0}, "below 1"),
        ({"val": "0.1"}, "share"),
        ({"val": 0.6, "test": 0.4}, "something for each part"),
        ({"folds": 1}, "at least 2"),
        ({"group_by": 3}, "needs a text"),
        ({"files": 3}, "needs a text"),
        ({"folds": 3, "fold": 3}, "0 to 2"),
        ({"files": "splits.json", "fold": -1}, "from 0 on"),
    ],
)
def test_split_mistakes_are_explained(config, message):
    with pytest.raises(UserError, match=message):
        Split.from_config(config)


def test_too_few_groups_are_an_error():
    with pytest.raises(UserError, match="1 groups cannot be divided"):
        split_cases(make_cases("aaaa"), [{1}] * 4, Split(), 0)
    with pytest.raises(UserError, match="3 groups cannot be divided into 4"):
        split_cases(make_cases("abc"), [{1}] * 3, Split(folds=4), 0)


LABELLED = st.lists(
    st.tuples(st.integers(0, 15), st.sets(st.integers(1, 4), max_size=3)), min_size=6, max_size=80
).filter(lambda cases: len({group for group, _ in cases}) >= 6)


def contents(members, classes):
    """Cases in all, empty, and with each class, counted independently of the code under test."""
    rows = [classes[int(case.name[1:])] for case in members]
    return [len(rows), sum(not row for row in rows), *(sum(c in row for row in rows) for c in range(1, 5))]


@given(LABELLED, st.integers(0, 3), st.integers(2, 5), st.sampled_from([0.0, 0.2]))
@settings(deadline=None, max_examples=40)
def test_folds_partition_all_but_the_test_cases_and_groups_never_part(labelled, seed, count, test):
    cases, classes = make_cases([group for group, _ in labelled]), [found for _, found in labelled]
    folds = fold_cases(cases, classes, Split(folds=count, test=test), seed)
    assert len(folds) == count
    aside = names(folds[0])["test"]
    assert bool(aside) == (test > 0)
    validated = []
    for number, parts in enumerate(folds):
        assert parts["val"]
        assert names(parts)["test"] == aside
        assert sorted(name for part in names(parts).values() for name in part) == [case.name for case in cases]
        homes = {}
        assert all(homes.setdefault(c.group, part) == part for part, members in parts.items() for c in members)
        validated += names(parts)["val"]
        assert names(split_cases(cases, classes, Split(folds=count, fold=number, test=test), seed)) == names(parts)
    assert sorted(validated + aside) == [case.name for case in cases]


@given(LABELLED, st.integers(0, 3), st.integers(2, 5))
@settings(deadline=None, max_examples=40)
def test_folds_are_never_more_uneven_than_dealing_at_random_on_average(labelled, seed, count):
    cases, classes = make_cases([group for group, _ in labelled]), [found for _, found in labelled]
    folds = fold_cases(cases, classes, Split(folds=count), seed)
    totals = contents(cases, classes)
    kinds = [index for index, total in enumerate(totals) if total]
    found = [contents(fold["val"], classes) for fold in folds]
    uneven = sum((Fraction(row[k], totals[k]) - Fraction(1, count)) ** 2 for row in found for k in kinds)
    of_groups = [contents([c for c in cases if c.group == name], classes) for name in {case.group for case in cases}]
    random = (1 - Fraction(1, count)) * sum(Fraction(row[k], totals[k]) ** 2 for row in of_groups for k in kinds)
    assert uneven <= random


@given(st.integers(10, 80), st.integers(0, 30), st.integers(2, 7), st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_without_groups_folds_differ_by_one_case_and_by_one_empty_one(filled, empty, count, seed):
    classes = [{1}] * filled + [set()] * empty
    cases = make_cases(range(filled + empty))
    found = [contents(fold["val"], classes) for fold in fold_cases(cases, classes, Split(folds=count), seed)]
    for column in zip(*found, strict=True):
        assert max(column) - min(column) <= 1


def test_a_rare_class_is_shared_out_over_groups_of_other_sizes():
    """Ten videos; a class that eight frames of five videos show is validated in every one of five folds."""
    sizes = [40, 35, 30, 25, 20, 20, 15, 10, 10, 5]
    frames = [(group, frame) for group, size in enumerate(sizes) for frame in range(size)]
    rare = {(0, 0): 2, (3, 1): 2, (5, 0): 2, (5, 1): 2, (7, 3): 2, (7, 4): 2, (9, 0): 2, (9, 1): 2}
    classes = [{1, rare[frame]} if frame in rare else {1} for frame in frames]
    cases = make_cases([group for group, _ in frames])
    for seed in range(10):
        found = [contents(fold["val"], classes) for fold in fold_cases(cases, classes, Split(folds=5), seed)]
        assert all(row[3] >= 1 for row in found)
        assert max(row[0] for row in found) - min(row[0] for row in found) <= 15


def test_another_seed_deals_other_folds_and_the_order_of_files_does_not_matter():
    cases, classes = make_cases(range(30)), [{1 + number % 3} for number in range(30)]
    drawn = {tuple(names(fold_cases(cases, classes, Split(folds=3), seed)[0])["val"]) for seed in range(8)}
    assert len(drawn) == 8
    again = fold_cases(cases[::-1], classes[::-1], Split(folds=3), 4)
    assert [names(fold) for fold in again] == [names(fold) for fold in fold_cases(cases, classes, Split(folds=3), 4)]


def test_rare_classes_are_drawn_for_validation_too():
    """Two of forty cases show class 2; half of the cases, so one of the two, validate."""
    classes = [{1, 2} if number in (3, 31) else {1} if number % 2 else set() for number in range(40)]
    for seed in range(20):
        parts = split_cases(make_cases(range(40)), classes, Split(val=0.5), seed)
        assert contents(parts["val"], classes)[3] == 1


def test_a_list_of_folds_is_read_as_nnunet_writes_it(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["c000", "c001"], "val": ["c002"]}, {"train": ["c002"], "val": ["c000"]}]))
    parts = split_cases(make_cases("abc"), [{1}] * 3, Split(files=str(path), fold=1), 0)
    assert names(parts) == {"train": ["c002"], "val": ["c000"], "test": []}
    with pytest.raises(UserError, match="holds 2 folds, 0 to 1; got 2"):
        split_cases(make_cases("abc"), [{1}] * 3, Split(files=str(path), fold=2), 0)
