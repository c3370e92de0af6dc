import csv
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visattn.cli import main
from visattn.compare import compare_runs
from visattn.compare.pictures import draw_pair
from visattn.compare.result import compare
from visattn.compare.runs import display_names, printable, read_runs
from visattn.compare.show import number, p_value
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.metrics import case_metrics
from visattn.scored import Input, write_cases, write_inputs, write_summary

LABELS = Labels.from_config({"background": 0, "polyp": 255})
NAN = math.nan


def scored(folder, rows, labels=LABELS, split="val", inputs=(), **summary):
    folder.mkdir(parents=True, exist_ok=True)
    write_cases(folder / "cases.csv", rows, split)
    write_summary(folder, {"labels": labels.to_config(), **summary})
    write_inputs(folder, inputs)
    return folder


def rows_of(dice, groups=None, kind="polyp", names=None, **more):
    """Rows of one class; `more` are further measures."""
    names = names or [f"c{number}" for number in range(len(dice))]
    groups = groups or names
    value = [None if math.isnan(entry) else float(entry) for entry in dice]
    return [
        {
            "case": name,
            "group": group,
            "class": kind,
            "dice": value[n],
            **{key: column[n] for key, column in more.items()},
        }
        for n, (name, group) in enumerate(zip(names, groups, strict=True))
    ]


def result_of(*folders):
    return compare(read_runs(folders))


# --- the table


def test_a_difference_that_is_known(tmp_path, capsys):
    """Four videos of three frames; the run is better by 0.1 in all but the last video, where it is worse by 0.05."""
    groups = [f"v{number // 3}" for number in range(12)]
    dice = np.linspace(0.5, 0.72, 12)
    one = scored(tmp_path / "one", rows_of(dice, groups, iou=[0.5] * 12))
    two = scored(tmp_path / "two", rows_of([*(dice[:9] + 0.1), *(dice[9:] - 0.05)], groups, iou=[0.5] * 12))
    assert main(["compare", str(one), str(two)]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.strip().startswith("dice"))
    # Signs of 0.3, 0.3, 0.3, 0.15: of the 16 sums, four are as far from 0 as 0.75
    assert line.split() == [
        "dice", "↑", "0.6100", "0.6725", "+0.0625", "\u22120.0500", "to", "+0.1000", "0.2500", "9/0/3",
    ]  # fmt: skip
    line = next(line for line in text.splitlines() if line.strip().startswith("iou"))
    assert line.split()[2:] == ["0.5000", "0.5000", "0.0000", "0.0000", "to", "0.0000", "1.0000", "0/12/0"]
    assert "(12 cases, 4 groups)" in text
    assert "Only 4 groups" in text
    assert "below 0.125." in text, "the smallest p that four groups can give"


def test_the_same_as_json(tmp_path, capsys):
    one = scored(tmp_path / "one", rows_of([0.5, 0.6, NAN], nsd=[0.1, None, None]), recipe="r")
    two = scored(tmp_path / "two", rows_of([0.6, 0.6, 0.0], nsd=[0.2, None, None]))
    assert main(["compare", str(one), str(two), "--json", "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert str(tmp_path / "out") in captured.err
    assert content == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["baseline"] == "one"
    assert [run["name"] for run in content["runs"]] == ["one", "two"]
    assert [run["recipe"] for run in content["runs"]] == ["r", None]
    dice, nsd = content["differences"]
    assert (dice["run"], dice["class"], dice["metric"]) == ("two", "polyp", "dice")
    assert (dice["baseline_mean"], dice["run_mean"]) == pytest.approx((0.7, 0.4))
    assert dice["difference"] == pytest.approx((0.1 + 0 - 1) / 3), "an image rightly left empty counts as 1"
    assert (dice["wins"], dice["ties"], dice["losses"], dice["filled"], dice["undefined"]) == (1, 1, 1, 1, 0)
    assert (nsd["pairs"], nsd["undefined"], nsd["low"], nsd["p"]) == (1, 2, None, None)
    assert [(entry["case"], entry["gain"]) for entry in content["largest"]] == [("c0", pytest.approx(0.1)), ("c2", -1)]
    with (tmp_path / "out" / "compare.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    assert [row["metric"] for row in table] == ["dice", "nsd"]
    assert float(table[0]["difference"]) == dice["difference"]
    assert (table[0]["run"], table[1]["p"]) == ("two", "")


def test_means_that_differ_from_those_of_one_run_alone_are_explained(tmp_path):
    one = scored(tmp_path / "one", rows_of([0.5, 0.7, NAN]))
    two = scored(tmp_path / "two", rows_of([0.5, 0.7, 0.0]))
    (note,) = (note for note in result_of(one, two).notes if "undefined" in note)
    assert "one value of dice" in note
    assert "0.6000 for the baseline and 0.4000 for the run" in note
    assert not any("undefined" in note for note in result_of(one, one).notes)


def test_identical_runs(tmp_path, capsys):
    one = scored(tmp_path / "one", rows_of([0.5, 0.25, NAN, 1.0], hd95=[3.0, 5.0, None, 0.0]))
    assert main(["compare", str(one), str(one)]) == 0
    text = capsys.readouterr().out
    assert "one (2)" in text
    for metric, zero in (("dice", "0.0000"), ("hd95", "0.0")):
        line = next(line for line in text.splitlines() if line.strip().startswith(metric)).split()
        assert line[4:] == [zero, zero, "to", zero, "1.0000", "0/3/0"]
    assert result_of(one, one).changes == [[]]


def test_several_runs_and_classes(tmp_path, capsys):
    labels = Labels.from_config({"background": 0, "rim": 1, "core": 2})
    generator = np.random.default_rng(0)
    folders = []
    for name in ("one", "two", "three"):
        rows = rows_of(generator.random(8), kind="rim") + rows_of(generator.random(8), kind="core")
        folders.append(scored(tmp_path / name, rows, labels))
    assert main(["compare", *map(str, folders)]) == 0
    text = capsys.readouterr().out
    assert [line.split()[2] for line in text.splitlines() if "dice" in line] == [
        "rim",
        "core",
        "mean",
    ] * 2
    assert text.count("Holm  ") == 2, "a column of each table"
    result = result_of(*folders)
    assert [entry.family for found in result.differences for entry in found] == [6] * 6
    raw = [entry.p for found in result.differences for entry in found]
    assert min(entry.p_holm for found in result.differences for entry in found) == pytest.approx(min(1, 6 * min(raw)))


def test_measures_that_one_run_lacks_are_named(tmp_path):
    one = scored(tmp_path / "one", rows_of([0.5, 0.7], hd95=[1.0, 2.0]))
    two = scored(tmp_path / "two", rows_of([0.5, 0.7]))
    result = result_of(one, two)
    assert [entry.metric for entry in result.differences[0]] == ["dice"]
    assert any("lacks it: hd95" in note for note in result.notes)


def test_numbers_as_text():
    assert [number(x, "dice", True) for x in (0.01234, -0.5, 0.0, -0.00001, NAN)] == [
        "+0.0123",
        "\u22120.5000",
        "0.0000",
        "0.0000",
        "\u2013",
    ]
    assert number(12.345, "hd95") == "12.3"
    assert [p_value(p) for p in (0.5, 0.00005, NAN)] == ["0.5000", "<0.0001", "\u2013"]


# --- what is refused


@pytest.fixture
def refused(capsys):
    def check(*folders, output=()):
        assert main(["compare", *map(str, folders), *output]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert len(error.strip().splitlines()) <= 6
        return error

    return check


def test_other_cases_are_named(tmp_path, refused):
    one = scored(tmp_path / "one", rows_of([0.5] * 9))
    two = scored(tmp_path / "two", rows_of([0.5] * 3, names=["c0", "c1", "extra"]))
    error = refused(one, two, output=("--output", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    assert "one and two score different cases: 9 and 3." in error
    assert "7 missing from two: c2, c3, c4, c5, ...\n" in error
    assert "1 missing from one: extra\n" in error


def test_the_same_names_in_other_groups(tmp_path, refused):
    one = scored(tmp_path / "one", rows_of([0.5, 0.6], ["p1", "p2"]))
    two = scored(tmp_path / "two", rows_of([0.5, 0.6]))
    error = refused(one, two)
    assert "'c0' is in 'p1' and in 'c0'" in error
    assert "group_by" in error


def test_a_group_is_part_of_the_name(tmp_path):
    names, groups = ["frame1", "frame1"], ["p1", "p2"]
    one = scored(tmp_path / "one", rows_of([0.1, 0.2], groups, names=names))
    two = scored(tmp_path / "two", rows_of([0.3, 0.4], groups[::-1], names=names))
    assert result_of(one, two).differences[0][0].difference == pytest.approx(0.2)
    assert result_of(one, two).changes[0][0].gain == pytest.approx(0.3), "p1: 0.1 and 0.4"


def test_other_classes_labels_splits(tmp_path, refused):
    one = scored(tmp_path / "one", rows_of([0.5, 0.6]))
    other = Labels.from_config({"background": 0, "adenoma": 255})
    error = refused(one, scored(tmp_path / "classes", rows_of([0.5, 0.6], kind="adenoma"), other))
    assert "one: polyp\nclasses: adenoma\n" in error
    for labels in (
        Labels.from_config({"background": 0, "polyp": [128, 255]}),
        Labels.from_config({"background": 0, "polyp": 255}, ignore=7),
        Labels.from_config({"background": 0, "lesion": 255}, regions={"polyp": ["lesion"]}),
    ):
        assert "different labels" in refused(one, scored(tmp_path / "labels", rows_of([0.5, 0.6]), labels))
    error = refused(one, scored(tmp_path / "split", rows_of([0.5, 0.6]), split="test"))
    assert "'c0' is in 'val' and in 'test'" in error


def test_masks_of_another_tool_belong_to_no_split(tmp_path):
    one = scored(tmp_path / "one", rows_of([0.5, 0.6]))
    two = scored(tmp_path / "two", rows_of([0.6, 0.6]), split="")
    assert result_of(one, two).differences[0][0].wins == 1


def test_other_truth_is_noticed_by_the_scores(tmp_path, refused):
    one = scored(tmp_path / "one", rows_of([0.5, NAN], fpr_empty=[None, 0.0]))
    two = scored(tmp_path / "two", rows_of([0.5, 0.6], fpr_empty=[None, None]))
    error = refused(one, two)
    assert "'c1' holds 'polyp' in the true mask of two, but not in that of one" in error


def test_other_truth_is_noticed_by_the_files(tmp_path, refused):
    def masks(name, value, at=3, suffix="png"):
        array = np.zeros((8, 8), np.uint8)
        array[at:] = value
        path = tmp_path / f"{name}.{suffix}"
        Image.fromarray(array).save(path)
        return [Input("c0", "c0", "", None, path, None)]

    one = scored(tmp_path / "one", rows_of([0.5]), inputs=masks("a", 255))
    same = scored(tmp_path / "same", rows_of([0.6]), inputs=masks("b", 250, suffix="bmp"))
    assert result_of(one, same).differences[0][0].wins == 1, "other bytes, same mask"
    gone = scored(tmp_path / "gone", rows_of([0.6]), inputs=[Input("c0", "c0", "", None, tmp_path / "no.png", None)])
    assert result_of(one, gone).differences[0][0].wins == 1
    other = scored(tmp_path / "other", rows_of([0.6]), inputs=masks("c", 255, at=4))
    error = refused(one, other)
    assert "The true masks of 'c0' differ" in error
    assert str(tmp_path / "c.png") in error


def test_one_run_and_no_run(tmp_path, refused):
    one = scored(tmp_path / "one", rows_of([0.5]))
    assert "at least two runs" in refused(one)
    assert "no such folder" in refused(one, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no cases.csv" in refused(one, tmp_path / "empty")
    evaluation = scored(tmp_path / "masks" / "evaluation", rows_of([0.5]))
    assert f"Did you mean {evaluation}?" in refused(one, tmp_path / "masks")
    twice = scored(tmp_path / "twice", rows_of([0.5, 0.5], names=["a", "a"]))
    assert "has class 'polyp' twice" in refused(one, twice)
    infinite = scored(tmp_path / "infinite", rows_of([0.5], hd95=[math.inf]))
    assert "infinite values" in refused(one, infinite)
    (one / "summary.json").write_text("{}")
    assert "names no labels" in refused(scored(tmp_path / "two", rows_of([0.5])), one)


def test_hostile_names_in_errors_stay_within_six_lines(tmp_path, refused):
    bad = "line\nbreak\x1b[31m" + "x" * 500
    one = scored(tmp_path / "one", rows_of([0.5, 0.6]))
    two = scored(tmp_path / "two", rows_of([0.5, 0.6], names=[bad, f"{bad}2"]))
    error = refused(one, two)
    assert "\x1b" not in error
    assert max(map(len, error.splitlines())) < 300


def test_a_run_is_not_written_over(tmp_path, refused):
    one, two = (scored(tmp_path / name, rows_of([0.5, 0.6])) for name in ("one", "two"))
    (one / "report.html").write_text("mine")
    assert "holds a run or its scores" in refused(one, two, output=("--output", str(one)))
    assert (one / "report.html").read_text() == "mine"
    assert "cannot be created" in refused(one, two, output=("--output", str(one / "report.html")))


def test_nothing_is_written_without_output(tmp_path, monkeypatch):
    folders = [scored(tmp_path / name, rows_of([0.5, 0.6])) for name in ("one", "two")]
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    assert compare_runs([Path("one"), Path("two")]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    del folders


# --- names


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a/unet", "a/pranet"], ["unet", "pranet"]),
        (["a/unet", "b/unet"], ["a/unet", "b/unet"]),
        (["x/a/unet", "y/a/unet", "y/b/unet"], ["x/a/unet", "y/a/unet", "b/unet"]),
        (["unet/evaluation", "pranet/evaluation"], ["unet", "pranet"]),
        (["a/u/evaluation", "b/u/evaluation"], ["a/u", "b/u"]),
        (["runs/polyp/20260101-101010", "runs/polyp/20260102-101010-1"],
         ["polyp/20260101-101010", "polyp/20260102-101010-1"]),
        (["r/p/20260101-101010/test", "r/p/20260101-101010/validate"],
         ["p/20260101-101010/test", "p/20260101-101010/validate"]),
        (["r/cv/fold-0", "r/cv/fold-1"], ["cv/fold-0", "cv/fold-1"]),
        (["a/unet", "a/unet", "b/x/../../a/unet", "a/b"], ["unet", "unet (2)", "unet (3)", "b"]),
        (["/", "/a"], ["", "a"]),
    ],
)  # fmt: skip
def test_display_names(folders, names):
    assert display_names([Path(folder) for folder in folders]) == names


def test_printable():
    assert printable("a\x1b[1m\u202e\ud800b") == "a?[1m??b"
    assert printable("x" * 100) == "x" * 59 + "…"


# --- pictures and page


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture
def masks(polyps, tmp_path):
    """Two folders with scores, masks and images of 12 cases: `shifted`, and `broken` with misses and false alarms."""
    truths = sorted((polyps / "masks").glob("*.png"))

    def make(name, change, **summary):
        folder = tmp_path / name
        rows, inputs = [], []
        for index, path in enumerate(truths):
            truth = LABELS.encode(np.asarray(Image.open(path)), path.name)
            predicted = change(index, truth)
            file = folder / "masks" / path.name
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(LABELS.decode(predicted)).save(file)
            (scores,) = case_metrics(predicted, truth, LABELS, suite="surface")
            group = f"video {index // 2}"
            rows.append({"case": path.stem, "group": group, "class": "polyp", **scores})
            (image,) = (polyps / "images").glob(f"{path.stem}.*")
            inputs.append(Input(path.stem, group, str(polyps), image, path, file))
        return scored(folder, rows, inputs=inputs, **summary)

    def shift(index, truth):
        return np.roll(truth, 2, axis=1)

    def broken(index, truth):
        if index in (2, 6):
            return np.zeros_like(truth)
        if not truth.any():
            return np.pad(np.ones((9, 9), np.uint8), ((0, truth.shape[0] - 9), (0, truth.shape[1] - 9)))
        return np.roll(truth, 1, axis=1)

    return make("shifted", shift), make("broken", broken)


def test_the_page(masks, tmp_path):
    assert main(["compare", *map(str, masks), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json", "compare.csv", "plot.png", "report.html",
    }  # fmt: skip
    page = Page(tmp_path / "out" / "report.html")
    result = result_of(*masks)
    entry = result.entry(0, "dice")
    for text in (
        "broken against shifted",
        number(entry.difference, "dice", True),
        number(entry.run_mean, "dice"),
        f"{entry.wins} / {entry.ties} / {entry.losses}",
        "12 cases (validation), from 6 groups",
        "Better in broken",
        "Worse in broken",
        "sign-flip",
    ):
        assert text in page.words, text
    changes = result.changes[0]
    assert [change.gain > 0 for change in changes] == [True] * 3 + [False] * (len(changes) - 3)
    # Two sides of each case, and the plot
    assert page.tags.count("img") == 2 * len(changes) + 1
    shown = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")][1:]
    assert shown == [
        f"case {change.case[1]} as segmented by {name}" for change in changes for name in ("shifted", "broken")
    ]
    with Image.open(tmp_path / "out" / "plot.png") as picture:
        assert picture.width > 1200


def test_synthetic_images_are_named_so(masks, tmp_path):
    one, two = masks
    for folder, expected in ((two, False), (one, True)):
        content = json.loads((folder / "summary.json").read_text())
        content["data"] = {"description": "phantom (embedded, synthetic)" if expected else "Kvasir-SEG"}
        (folder / "summary.json").write_text(json.dumps(content))
        assert compare_runs([one, two], output=tmp_path / "out") == 0
        assert ("Synthetic images." in Page(tmp_path / "out" / "report.html").words) == expected


def test_the_two_sides_show_the_two_predictions(masks):
    result = result_of(*masks)
    missed = next(change for change in result.changes[0] if change.gain < -0.3)
    pair = draw_pair(result, missed)
    (left, left_scores, left_uri), (right, right_scores, right_uri) = pair.pictures
    assert (left, right) == ("shifted", "broken")
    assert left_uri != right_uri
    row = result.baseline.table.cases.index(missed.case)
    for scores, run in ((left_scores, result.baseline), (right_scores, result.runs[0])):
        assert scores.startswith(f"Dice {number(run.table.values['dice'][row, 0], 'dice')}, IoU")


def test_files_that_are_gone_are_told(masks, tmp_path):
    one, two = masks
    for path in (two / "masks").iterdir():
        path.unlink()
    assert compare_runs([one, two], output=tmp_path / "out") == 0
    page = Page(tmp_path / "out" / "report.html")
    assert page.tags.count("img") == 1
    assert page.words.count("No pictures:") == len(result_of(one, two).changes[0])
    (two / "inputs.json").unlink()
    result = result_of(one, two)
    assert draw_pair(result, result.changes[0][0]).reason.startswith("broken does not say where")


def test_a_missing_prediction_of_evaluate_is_drawn_as_empty(masks):
    one, two = masks
    content = json.loads((two / "inputs.json").read_text())
    content["cases"] = [entry | {"prediction": None, "image": None} for entry in content["cases"]]
    (two / "inputs.json").write_text(json.dumps(content))
    result = result_of(one, two)
    assert "kept no predicted mask" in draw_pair(result, result.changes[0][0]).reason
    result.runs[0].scored.summary["prediction"] = "masks"
    assert len(draw_pair(result, result.changes[0][0]).pictures) == 2


HOSTILE = [
    '<script>alert("x")</script>',
    '"><img src=x onerror=alert(1)>',
    "{{ 1234567 * 9 }}",
    "=1+1",
    "$\\frac{$",
    "名\u202e",
    "[red]a[/red]",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(tmp_path, name, capsys):
    labels = Labels.from_config({"background": 0, name: 255, "b": 1})
    folders = []
    for index, folder in enumerate((f"{name}-one".replace("/", "_"), name.replace("/", "_"))):
        names = [name, f"{name}2", "z"]
        rows = [
            row
            for kind in (name, "b")
            for row in rows_of(np.array([0.5, 0.7, 0.6]) + index / 9, names[::-1], kind, names)
        ]
        folders.append(scored(tmp_path / folder, rows, labels, split=name, recipe=name))
    assert compare_runs(folders, output=tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert printable(folders[1].name) in text
    page = Page(tmp_path / "out" / "report.html")
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "p", "h1", "h2", "h3",
        "bdi", "div", "figure", "figcaption", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "span",
        "img", "br", "dl", "dt", "dd",
    }  # fmt: skip
    assert page.tags.count("img") == 1, "the plot"
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert all(value.startswith("data:image/") for _, key, value in page.attributes if key in {"src", "href"})
    assert "http:" not in page.source
    assert "11111103" not in re.sub(r"[\d.]{4,}|data:\S+", "", page.words)
    assert name in page.text
    policy = [value for _, key, value in page.attributes if key == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    with (tmp_path / "out" / "compare.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    prefix = "'" if name.startswith("=") else ""
    assert {row["class"] for row in rows} == {prefix + name, "b", "mean"}
    assert {row["run"] for row in rows} == {prefix + folders[1].name}


def test_a_folder_whose_name_is_not_utf8(tmp_path, capsys):
    one = scored(tmp_path / "one", rows_of([0.5, 0.6]))
    two = scored(tmp_path / "two\udcff", rows_of([0.6, 0.6]))
    assert compare_runs([one, two], output=tmp_path / "out\udcff") == 0
    assert "two?" in capsys.readouterr().out
    assert b'"two\xff"' in (tmp_path / "out\udcff" / "compare.csv").read_bytes()


def test_without_the_extra_the_tables_are_written(tmp_path, monkeypatch, capsys):
    folders = [scored(tmp_path / name, rows_of([0.5, 0.6])) for name in ("one", "two")]
    monkeypatch.setitem(sys.modules, "jinja2", None)  # import fails
    assert compare_runs(folders, output=tmp_path / "out") == 0
    assert "visattn[report]" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.json", "compare.csv"}


def test_nothing_heavy_is_imported(tmp_path):
    folders = [str(scored(tmp_path / name, rows_of([0.5, 0.6]))) for name in ("one", "two")]
    code = (
        "import sys; from visattn.cli import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'lightning', 'jinja2', 'matplotlib.figure'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", code, "compare", *folders]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_refused_from_python(tmp_path):
    with pytest.raises(UserError, match="got none"):
        read_runs([])
