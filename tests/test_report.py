import csv
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from visattn import NOTICE
from visattn.curves import read_metrics
from visattn.errors import UserError
from visattn.folds_file import Folds, write_folds
from visattn.overlay import write_png
from visattn.report import write_curves, write_report

SHAPES = {"line", "rect", "circle", "polyline"}
SCRIPT = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Tags, attributes and visible text; fails on tags that do not nest."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []
        self.words = " ".join(self.text.split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in {"meta", "img", "br"} and not (tag in SHAPES and self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + " "


def write_cases(run, rows):
    with (run / "cases.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def case(name, dice, kind="polyp", group="", split="val", **more):
    return {"case": name, "group": group or name, "class": kind, "split": split, "dice": dice, "iou": dice, **more}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "20260101-101010"
    (folder / "overlays").mkdir(parents=True)
    write_cases(folder, [case("a", 0.25), case("b", 0.75, hd95=12.0), case("c", ""), case("d", 0.5)])
    summary = {
        "recipe": "polyp_pranet",
        "split": "val",
        "checkpoint": "checkpoints/best.ckpt",
        "best_epoch": 1,
        "data": {
            "description": "phantom (embedded, synthetic)",
            "fingerprint": "f00d",
            "counts": {"train": 8, "val": 4},
        },
        "hardware": "cpu, 2 cores",
        "seconds": 3725.0,
        "versions": {"torch": "9.9.9"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text("seed_everything: 0\nname: <b>bold</b>\n")
    (folder / "metrics.csv").write_text(
        "epoch,step,train/loss,val/loss,val/dice,val/iou,lr\n0,4,1.5,1.6,0.2,0.1,0.1\n1,8,1.0,1.2,0.6,0.5,0.1\n2,12,0.9,1.3,0.5,0.4,0.1\n"
    )
    for index, kind in enumerate(("worst-1-a", "worst-2-d", "best-1-b")):
        write_png(folder / "overlays" / f"{kind}.png", np.full((30, 40, 3), 60 * index, np.uint8))
    write_png(folder / "curves.png", np.full((50, 90, 3), 255, np.uint8))
    return folder


def test_everything_stands_in_one_file(run):
    page = Page(write_report(run))
    for text in (
        "polyp_pranet", NOTICE, "Synthetic images.", "phantom (embedded, synthetic)", "f00d", "8 train, 4 val",
        "checkpoints/best.ckpt", "2 of 3", "1 h 2 min", "cpu, 2 cores", "9.9.9", "seed_everything: 0",
        "chosen on these cases",
    ):  # fmt: skip
        assert text in page.words, text
    assert "0.500" in page.words, "mean Dice of 0.25, 0.75 and 0.5"
    line = next(part for part in page.words.split("\u2191") if part.lstrip().startswith("0.500"))
    assert line.split()[4:6] == ["3", "1"], "3 cases, 1 undefined"
    assert page.tags.count("img") == 4
    order = [
        page.words.index(text)
        for text in ("Lowest Dice", "a Dice 0.250", "d Dice 0.500", "Highest Dice", "b Dice 0.750")
    ]
    assert order == sorted(order)


def test_it_needs_no_network_and_runs_nothing(run):
    page = Page(write_report(run))
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video"} & set(page.tags)
    assert "http://" not in page.source
    assert "https://" not in page.source
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "srcset", "xlink:href"}:
            assert tag == "img"
            assert value.startswith("data:image/")
        if name == "style":
            assert re.fullmatch(r"--share: [01]\.\d{3}|stroke: #[0-9a-f]{6}", value)
    assert "url(" not in page.source
    assert "@import" not in page.source
    policy = [value for tag, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


HOSTILE = [
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "new\nline",
    "\x1b[31m\x00",
    "名前\u202e",
    "&amp;",
    "'=1+1",
]


def add(run, **entries):
    """Add entries to the summary of a run."""
    path = run / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def bins(count, confidence=None, frequency=None, ece=0.0125):
    middle = [(index + 0.5) / 10 if n else None for index, n in enumerate(count)]
    return {"count": count, "confidence": confidence or middle, "frequency": frequency or middle, "ece": ece}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(run, name):
    write_cases(
        run,
        [case(name, 0.25, kind=name + k, split=name) for k in "ab"]
        + [case("z", 0.5, name + k, split=name) for k in "ab"],
    )
    content = json.loads((run / "summary.json").read_text())
    content |= {"recipe": name, "hardware": name, "checkpoint": name, "versions": {name: name}, "unknown": name}
    content["data"] = {"description": name, "fingerprint": name, "counts": {name: name}}
    (run / "summary.json").write_text(json.dumps(content))
    (run / "config.yaml").write_text(name)
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name.removeprefix("'"))
    write_png(run / "overlays" / f"worst-3-{safe}.png", np.zeros((4, 4, 3), np.uint8))
    add(
        run,
        labels={"labels": {"background": 0, name: 1, f"{name}2": 2}},
        confusion={"names": ["background", name, f"{name}2"], "counts": [[5, 1, 0], [2, 7, 1], [0, 0, 0]]},
        calibration={name: bins([9, 0, 0, 0, 3, 0, 0, 0, 0, 4]), f"{name}2": bins([0] * 10, ece=None)},
        prediction=name,
        truth=name,
        versions={name: name},
        hardware=name,
        recipe=name,
    )
    page = Page(write_report(run))
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "p", "h1", "h2", "h3",
        "bdi", "strong", "div", "figure", "figcaption", "svg", "line", "rect", "text", "circle", "polyline",
        "details", "summary", "table",
        "thead", "tbody", "tr", "th", "td", "span", "img", "br", "dl", "dt", "dd", "code", "pre",
    }  # fmt: skip
    assert page.tags.count("img") == 5
    assert not [value for _, key, value in page.attributes if key.startswith("on") or "alert" in key]
    assert "49" not in page.words
    expected = name.replace("\x00", "\ufffd").removeprefix("'")
    assert " ".join(expected.split()) in page.words.replace("\x00", "\ufffd")


def test_a_file_name_that_is_not_utf8(run):
    write_png(run / "overlays" / "worst-9-\udcff.png", np.zeros((4, 4, 3), np.uint8))
    assert "\\udcff" in Page(write_report(run)).words


def test_several_classes_and_splits(run):
    rows = [
        case(n, d, k, group=g, split=s)
        for s in ("val", "test")
        for n, g, d in (("a", "p1", 0.2), ("b", "p1", 0.4), ("c", "p2", 0.6))
        for k in ("rim", "core")
    ]
    write_cases(run, rows)
    page = Page(write_report(run))
    assert page.words.count("mean of the classes") == 2
    assert "Results on validation cases" in page.words
    assert "Results on test cases" in page.words
    assert page.words.count("from 2 groups") == 2
    assert page.words.index("rim") < page.words.index("mean of the classes") < page.words.index("All measures: rim")


def test_a_bare_folder_still_gives_a_report(tmp_path):
    page = Page(write_report(tmp_path))
    assert NOTICE in page.words
    assert "No cases were scored" in page.words
    assert "Synthetic" not in page.words
    (tmp_path / "summary.json").write_text('{"data": 3, "versions": [], "best_epoch": "x", "seconds": null}')
    write_report(tmp_path)


def test_what_cannot_be_read_is_told(run, tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "x")
    before = write_report(run).read_bytes()
    for text in ("{", "[]"):
        (run / "summary.json").write_text(text)
        with pytest.raises(UserError, match=r"summary\.json: not the summary"):
            write_report(run)
    (run / "summary.json").unlink()
    for text in ("case,class,dice\na,polyp,abc\n", "case,class,dice\n,polyp,0.1\n", "x\n1\n"):
        (run / "cases.csv").write_text(text)
        with pytest.raises(UserError, match=r"cases\.csv: not a table"):
            write_report(run)
    (run / "cases.csv").write_text("case,class,dice\na,polyp,0.5\na,polyp,0.5\n")
    with pytest.raises(UserError, match="twice"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before, "the last good report stays"


def test_broken_pictures_are_left_out(run):
    (run / "overlays" / "worst-1-a.png").write_bytes(b"\x89PNG broken")
    (run / "overlays" / "notes-1-a.png").write_bytes(b"")
    assert Page(write_report(run)).tags.count("img") == 3


def test_large_pictures_are_made_smaller(run):
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2400, 3)).astype(np.uint8)
    write_png(run / "overlays" / "worst-1-a.png", noise)
    assert (run / "overlays" / "worst-1-a.png").stat().st_size > 8e6
    assert write_report(run).stat().st_size < 3e6


def test_curves(run):
    write_curves(run)
    with Image.open(run / "curves.png") as image:
        assert image.width > 1400
        picture = np.asarray(image.convert("RGB")).astype(int)
    for colour in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0xCC, 0x79, 0xA7)):  # training, validation and Dice, IoU
        assert (np.abs(picture - colour).max(axis=-1) < 12).sum() > 100
    before = (run / "curves.png").read_bytes()
    write_curves(run)
    assert (run / "curves.png").read_bytes() == before
    (run / "metrics.csv").write_text("epoch,val/dice\n0,0.5\n")
    assert write_curves(run) == run / "curves.png", "one epoch and one column are enough"


def test_curves_without_anything_to_draw(tmp_path):
    assert write_curves(tmp_path) is None
    for text in ("", "epoch,val/dice\n", "epoch,val/dice\n0,nan\n", "epoch\n0\n", "\x00\xff"):
        (tmp_path / "metrics.csv").write_text(text)
        assert write_curves(tmp_path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_metrics_of_one_epoch_on_several_rows(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/dice\n0,1,,0.5\n0,1,2.0,\n1,2,inf,0.6\n1,2,")
    series = read_metrics(tmp_path / "metrics.csv")
    assert series["val/dice"] == {0: 0.5, 1: 0.6}
    assert series["train/loss"] == {0: 2.0}


def test_without_the_extra_nothing_breaks(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jinja2", None)  # import fails
    assert write_report(run) is None
    assert "visattn[report]" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_curves(run) is None
    assert not (run / "report.html").exists()


def test_confusion_of_classes(run):
    names = ["background", "rim", "core"]
    add(run, confusion={"names": names, "counts": [[99_990, 9, 1], [250, 750, 0], [0, 0, 0]]})
    page = Page(write_report(run))
    assert "All 101 000 pixels" in page.words
    text = page.words[page.words.index("What is taken for what") :]
    for line in (
        "background > 99.9 % 99 990 < 0.1 % 9 < 0.1 % 1 100 000",
        "rim 25.0 % 250 75.0 % 750 0.0 % 0 1 000",
        "core \u2013 0 \u2013 0 \u2013 0 0",
    ):
        assert line in text
    right = [value for tag, key, value in page.attributes if tag == "td" and key == "class" and "right" in value]
    assert len(right) == 3
    shares = [value for tag, key, value in page.attributes if tag == "td" and key == "style"]
    assert shares[3:6] == ["--share: 0.250", "--share: 0.750", "--share: 0.000"]


def test_confusion_of_regions(run):
    add(run, confusion={"regions": {"whole": [[90, 10], [0, 100]], "centre": [[150, 0], [25, 25]]}})
    text = Page(write_report(run)).words
    assert "All 200 pixels of all cases, for each region" in text
    assert "whole Truth outside predicted inside predicted Pixels outside 90.0 % 90 10.0 % 10 100" in text
    assert "inside 50.0 % 25 50.0 % 25 50" in text


def test_many_classes_are_summed_up(run):
    count = 254
    names = [f"class {index}" for index in range(count)]
    counts = np.eye(count, dtype=int) * 1000
    counts[3, 200], counts[7, 0] = 500, 2
    calibration = {name: bins([10] + [0] * 9, ece=index / 1000) for index, name in enumerate(names[1:])}
    add(
        run,
        confusion={"names": names, "counts": counts.tolist()},
        calibration=calibration,
        labels={"labels": {name: index for index, name in enumerate(names)}},
    )
    page = Page(write_report(run))
    assert "Pixels Of the true class class 3 class 200 500 33.3" in page.words
    assert page.words.count("mean error (ECE)") == 12
    assert "class 253 mean error (ECE) 0.252" in page.words, "the worst"
    assert "and 241 classes more" in page.words
    assert "and 234 more" in page.words
    assert len(page.source) < 300_000
    write_cases(run, [case("a", 0.5, name) for name in (f"class {index}" for index in range(300))])
    page = Page(write_report(run))
    assert "Dice 0.500, IoU 0.500; and 294 classes more" in page.words


def test_calibration(run):
    perfect = [(index + 0.5) / 10 for index in range(10)]
    add(run, calibration={"polyp": bins([100_000, *[10] * 8, 5000], perfect, [*perfect[:9], 0.5])})
    page = Page(write_report(run))
    assert "polyp mean error (ECE) 0.013 over 105 080 pixels" in page.words
    dots = [dict(zip(*[iter(group)] * 2, strict=True)) for group in _circles(page)]
    assert len(dots) == 10
    assert (dots[0]["cx"], dots[0]["cy"]) == ("58.0", "238.0")
    assert (dots[9]["cx"], dots[9]["cy"]) == ("274.0", "130.0"), "0.95 promised, 0.5 true: below the diagonal"
    assert float(dots[0]["r"]) > float(dots[9]["r"]) > float(dots[5]["r"]) >= 2.5
    assert "given 95.0 %: 50.0 % truly so" in page.words


def _circles(page):
    found = []
    for tag, key, value in page.attributes:
        if tag == "circle":
            if key == "cx":
                found.append([])
            found[-1] += [key, value]
    return found


@pytest.mark.parametrize(
    "entries",
    [
        {"confusion": []},
        {"confusion": [1]},
        {"confusion": {"names": ["a", "b"], "counts": [[1, 2]]}},
        {"confusion": {"names": ["a", "b"], "counts": [[1, 2], [3]]}},
        {"confusion": {"names": ["a"], "counts": [["1"]]}},
        {"confusion": {"names": ["a"], "counts": [[-1]]}},
        {"confusion": {"names": [1], "counts": [[1]]}},
        {"confusion": {"regions": {"a": [[1, 2, 3], [4, 5, 6]]}}},
        {"confusion": {"regions": [1]}},
        {"calibration": [1]},
        {"calibration": {"a": 3}},
        {"calibration": {"a": {"count": [1], "confidence": [None], "frequency": [0.5], "ece": 0}}},
        {"calibration": {"a": {"count": [1], "confidence": [2], "frequency": [0.5], "ece": 0}}},
        {"calibration": {"a": {"count": [1], "confidence": [], "frequency": [0.5], "ece": 0}}},
        {"calibration": {"a": {"count": [], "confidence": [], "frequency": [], "ece": "x"}}},
        {"labels": {"labels": {"a": 1}}},
        {"labels": {"mistake": {}}},
        {"labels": "x"},
    ],
)
def test_entries_of_another_form_are_told(run, entries):
    add(run, **entries)
    if entries == {"confusion": []}:
        assert write_report(run)
        return
    with pytest.raises(UserError, match=r"summary\.json") as caught:
        write_report(run)
    assert len(str(caught.value).splitlines()) <= 6


def test_nan_everywhere(run):
    write_cases(run, [case(name, "nan", kind, hd95="nan") for name in "abc" for kind in ("x", "y")])
    page = Page(write_report(run))
    assert "nan" not in page.words.lower().split()
    assert "mean Dice of" not in page.words


def test_a_very_long_name(run):
    name = "very_long_" * 500
    write_cases(run, [case(name, 0.5, name)])
    add(run, recipe=name, calibration={name: bins([1] * 10)})
    assert Page(write_report(run)).words.count(name) >= 4


def test_the_words_fit_what_was_scored(run):
    page = Page(write_report(run))
    assert "predicted and true area match with a mean Dice of 0.500 ; 1 of 3 cases stays below 0.5" in page.words
    assert "from a probability of 0.5 on" in page.words
    add(run, labels={"labels": {"background": 0, "a": 1, "b": 2}})
    assert "each pixel belongs to its most probable class" in Page(write_report(run)).words
    write_cases(run, [case("b", 0.75, group="p"), case("d", 0.5, group="p")])
    page = Page(write_report(run))
    assert "no case stays below 0.5" in page.words
    assert "In 2 cases of 1 group (patients, videos)" in page.words


def test_masks_of_another_tool(run):
    """What `visattn evaluate` writes has no checkpoint, recipe, curves or fingerprint."""
    for path in (run / "metrics.csv", run / "config.yaml", run / "curves.png"):
        path.unlink()
    write_cases(run, [case("a", 0.5, split="test"), case("b", 0.7, split="test")])
    summary = {"prediction": "/some/where/nnunet", "truth": "/some/where/masks", "split": "test"}
    (run / "summary.json").write_text(json.dumps(summary | {"labels": {"labels": {"background": 0, "polyp": 255}}}))
    add(run, missing=[f"case {number}" for number in range(9)], extra=["x"], group_by="sequence", truth="/x/masks")
    page = Page(write_report(run))
    assert page.words.startswith("nnunet \u00b7 visattn report")
    assert "counted as misses 9: case 0, case 1, case 2, case 3, case 4, case 5, ..." in page.words
    assert "Without truth, not scored 1: x Grouped by sequence" in page.words
    for text in ("Scores of these masks", "Predicted masks /some/where/nnunet", "True masks /x/masks",
                 "background 0, polyp 255"):  # fmt: skip
        assert text in page.words, text
    add(run, prediction="runs/first/masks")
    assert Page(write_report(run)).words.startswith("first/masks \u00b7")
    for text in ("checkpoint", "Checkpoint", "probability of", "Fingerprint", "Recipe", "Training", "unknown"):
        assert text not in page.words, text


@pytest.fixture
def folds(run):
    root = run / "root"
    names = ["fold-0", "fold-1", "fold-2"]
    write_folds(Folds(root, 3, "polyp_pranet", "f00d"), [{"train": ["b"], "val": ["a"]}] * 3)
    for number, name in enumerate(names[:2]):
        (root / name).mkdir()
        write_cases(root / name, [case(n, d + 0.2 * number, k) for n, d in (("a", 0.2), ("b", 0.3)) for k in "xy"])
    (root / "fold-0" / "report.html").touch()
    (root / "summary.json").write_text(
        json.dumps({"recipe": "polyp_pranet", "split": "val", "folds": [{"run": "fold-0"}]})
    )
    write_cases(root, [case("a", 0.5), case("b", 0.75)])
    return root


def test_a_run_with_folds(folds):
    page = Page(write_report(folds))
    assert "divided into 3 parts" in page.words
    assert re.search(r"fold-0 0\.250 \S+ . \S+ 2 fold-1", page.words), "2 cases, whatever the number of classes"
    assert "fold-1 0.450" in page.words
    assert "fold-2 not finished" in page.words
    assert "scored by the fold that had not trained on it. The best checkpoint" in page.words
    assert [value for tag, key, value in page.attributes if tag == "a"] == ["fold-0/report.html"]


def test_folds_that_name_other_places_are_refused(folds):
    content = json.loads((folds / "folds.json").read_text())
    (folds / "folds.json").write_text(json.dumps(content | {"runs": ["javascript:alert(1)", "..", "/"]}))
    with pytest.raises(UserError, match=r"folds\.json"):
        write_report(folds)


def test_the_legend_stands_beside_the_lines(run, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **more: (figures.append(self), save(self, *args, **more))
    )
    # Lines through every corner.
    rows = [f"{e},{e},{1.5 if e % 2 else 0},{e % 2},{e % 2},{1 - e % 2},0.1" for e in range(8)]
    (run / "metrics.csv").write_text("\n".join(["epoch,step,train/loss,val/loss,val/dice,val/iou,lr", *rows]))
    write_curves(run)
    (figure,) = figures
    assert len(figure.axes) == 2
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert not legend.overlaps(axes._left_title.get_window_extent())
        assert figure.bbox.containsx(legend.x0)
        assert figure.bbox.containsx(legend.x1)
