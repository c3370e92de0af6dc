import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data.cases import Case
from visattn.data.splits import PARTS, Split, find_groups, split_cases, write_splits
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
    cases, foreground = make_cases([group for group, _ in grouped]), [filled for _, filled in grouped]
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
    cases, foreground = make_cases([group for group, _ in grouped]), [filled for _, filled in grouped]
    shuffled = random.sample(range(len(cases)), len(cases))
    once = split_cases(cases, foreground, Split(val=0.2, test=0.1), seed)
    again = split_cases([cases[i] for i in shuffled], [foreground[i] for i in shuffled], Split(val=0.2, test=0.1), seed)
    assert names(once) == names(again)


def test_another_seed_draws_another_split():
    cases = make_cases(range(40))
    drawn = {tuple(names(split_cases(cases, [True] * 40, Split(), seed))["val"]) for seed in range(8)}
    assert len(drawn) == 8


@given(GROUPED, st.integers(0, 3), st.integers(2, 5))
@settings(deadline=None)
def test_folds_partition_the_cases_exactly(grouped, seed, folds):
    cases, foreground = make_cases([group for group, _ in grouped]), [filled for _, filled in grouped]
    validated = Counter()
    for fold in range(folds):
        parts = names(split_cases(cases, foreground, Split(folds=folds, fold=fold), seed))
        assert sorted(parts["train"] + parts["val"]) == [case.name for case in cases]
        validated.update(parts["val"])
    assert validated == Counter(case.name for case in cases)


@pytest.mark.parametrize(("val", "test"), [(0.1, 0.0), (0.25, 0.1), (0.5, 0.25)])
@pytest.mark.parametrize("count", [20, 101, 400])
def test_ratios_are_met_to_the_case_and_empty_images_are_shared_out(val, test, count):
    cases, foreground = make_cases(range(count)), [number % 10 != 0 for number in range(count)]
    parts = split_cases(cases, foreground, Split(val=val, test=test), 0)
    for part, share in (("val", val), ("test", test)):
        assert abs(len(parts[part]) - share * count) <= 1
        empty = sum(not foreground[int(case.name[1:])] for case in parts[part])
        assert abs(empty - share * count / 10) <= 1


def test_ratio_with_groups_is_off_by_at_most_half_the_largest_group():
    sizes = [17, 3, 25, 9, 12, 30, 8, 21, 14, 11]
    cases = make_cases([group for group, size in enumerate(sizes) for _ in range(size)])
    for seed in range(20):
        parts = split_cases(cases, [True] * len(cases), Split(val=0.2), seed)
        assert abs(len(parts["val"]) - 0.2 * len(cases)) <= max(sizes) / 2


def test_folds_share_out_sizes_and_empty_images():
    cases, foreground = make_cases(range(60)), [number % 5 != 0 for number in range(60)]
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
        ("{folder}/none.csv:patient", "cannot read"),
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
    parts = split_cases(cases, [True] * 12, Split(val=0.25, test=0.25), 0)
    write_splits(tmp_path / "splits.json", parts)
    again = split_cases(cases, [True] * 12, Split(files=str(tmp_path / "splits.json")), 99)
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
        split_cases(make_cases("aabb"), [True] * 4, Split(files=str(path)), 0)


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
    ],
)
def test_split_mistakes_are_explained(config, message):
    with pytest.raises(UserError, match=message):
        Split.from_config(config)


def test_too_few_groups_are_an_error():
    with pytest.raises(UserError, match="1 groups cannot be divided"):
        split_cases(make_cases("aaaa"), [True] * 4, Split(), 0)
    with pytest.raises(UserError, match="3 groups cannot be divided into 4"):
        split_cases(make_cases("abc"), [True] * 3, Split(folds=4), 0)
