import csv
import json
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from visattn import NOTICE
from visattn.curves import read_metrics
from visattn.errors import UserError
from visattn.overlay import write_png
from visattn.report import write_curves, write_report

VOID = {"meta", "img", "br", "line", "rect"}
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
        if tag not in {"meta", "img", "br"} and not (
            tag in {"line", "rect"} and self.get_starttag_text().endswith("/>")
        ):
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
    page = Page(write_report(run))
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "p", "h1", "h2", "h3",
        "bdi", "strong", "div", "figure", "figcaption", "svg", "line", "rect", "text", "details", "summary", "table",
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
