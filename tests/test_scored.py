import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data.cases import embedded
from visattn.data.phantoms import PHANTOM
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.overlay import write_png
from visattn.scored import (
    Input,
    choose,
    load_case,
    read_cases,
    read_inputs,
    read_scored,
    safe_name,
    write_cases,
    write_inputs,
    write_overlays,
    write_summary,
)

LABELS = Labels.from_config({"background": 0, "polyp": 255})


def row(case, dice, kind="polyp", group=None, **more):
    return {"case": case, "group": group or case, "class": kind, "dice": dice, "iou": dice, **more}


FILE_NAMES = st.one_of(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1),
    st.text(alphabet="'=+-@\t\r\n,\"; a", min_size=1),
    st.binary(min_size=1).map(lambda name: name.decode("utf-8", "surrogateescape")),
)


@settings(deadline=None)
@given(names=st.lists(FILE_NAMES, min_size=1, unique=True))
def test_any_name_of_a_file_comes_back_from_the_table(names, tmp_path_factory):
    path = tmp_path_factory.mktemp("cases") / "cases.csv"
    rows = [row(name, 0.25, kind=name, group=name) for name in names]
    write_cases(path, rows, "val")
    back = read_cases(path)
    assert [(r["case"], r["group"], r["class"], r["split"]) for r in back] == [(n, n, n, "val") for n in names]
    assert {r["dice"] for r in back} == {"0.25"}


def test_a_spreadsheet_runs_no_name(tmp_path):
    write_cases(tmp_path / "cases.csv", [row("=cmd|x", 0.5, group="@g", kind="-k"), row("'+1", None)], "")
    text = (tmp_path / "cases.csv").read_text()
    assert text == "case,group,class,split,dice,iou\n'=cmd|x,'@g,'-k,,0.5,0.5\n''+1,''+1,polyp,,,\n"
    assert [r["case"] for r in read_cases(tmp_path / "cases.csv")] == ["=cmd|x", "'+1"]


@settings(deadline=None)
@given(names=st.lists(FILE_NAMES, min_size=2, unique=True))
def test_safe_names_are_fit_for_files_and_differ(names):
    safe = [safe_name(name) for name in names]
    assert len(set(safe)) == len(names)
    for name in safe:
        assert name == name.strip(". ")
        assert name.isprintable()
        assert not set(name) & set('/\\:*?"<>|%')
        assert 0 < len(name.encode()) < 150
        assert safe_name(name) == name or "~" in name


@pytest.mark.parametrize(
    "name", ["cju0qkwl35piu0993l0dewei2", "Image_01L", "polyp 12 (a)", "Läsion-3.b", "影像_1", "#1"]
)
def test_an_ordinary_name_stays(name):
    assert safe_name(name) == name


def test_a_changed_name_cannot_be_taken_for_a_plain_one():
    assert safe_name("a/b").startswith("a_b~")
    assert safe_name("a_b") == "a_b"
    assert safe_name(safe_name("a/b")) != safe_name("a/b")
    assert safe_name("..").startswith("~")


def test_undefined_numbers_become_null_at_any_depth(tmp_path):
    write_summary(tmp_path, {"a": math.nan, "b": [{"c": math.inf, "d": (1.5, -math.inf)}], "e": "nan"})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "a": None,
        "b": [{"c": None, "d": [1.5, None]}],
        "e": "nan",
    }


def test_inputs_move_with_their_folder(tmp_path, monkeypatch):
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    monkeypatch.chdir(tmp_path)
    entries = [
        Input("a", "p1", "../data", data / "a.jpg", Path("data/masks/a.png"), run / "masks" / "a.png"),
        Input("phantom_0001", "phantom_0001", "phantom", None, None, None),
    ]
    write_inputs(run, entries)
    text = json.loads((run / "inputs.json").read_text())
    assert text["cases"][0]["prediction"] == "masks/a.png"
    assert text["cases"][0]["truth"] == str(data / "masks" / "a.png")
    run.rename(tmp_path / "moved")
    found = read_inputs(Path("moved"))
    assert found["p1", "a"].prediction == tmp_path / "moved" / "masks" / "a.png"
    assert found["p1", "a"].truth == data / "masks" / "a.png"
    assert found["phantom_0001", "phantom_0001"] == entries[1]


@pytest.fixture
def scored(tmp_path):
    folder = tmp_path / "scored"
    folder.mkdir()
    write_cases(folder / "cases.csv", [row("a", 0.5), row("b", None)], "test")
    write_summary(folder, {"labels": LABELS.to_config()})
    write_inputs(folder, [Input("a", "a", "r", None, tmp_path / "t.png", None)])
    return folder


def test_a_scored_folder_is_read(scored):
    found = read_scored(scored)
    assert found.labels == LABELS
    assert [r["dice"] for r in found.rows] == ["0.5", ""]
    assert list(found.inputs) == [("a", "a")]
    (scored / "inputs.json").unlink()
    assert read_scored(str(scored)).inputs == {}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, None, "no such folder"),
        ("cases.csv", None, r"holds no cases\.csv"),
        ("summary.json", None, r"holds no summary\.json"),
        ("cases.csv", "case,class,dice\n", "holds no case"),
        ("cases.csv", "case,class,dice\na,polyp,x\n", "not a table of cases"),
        ("cases.csv", "case,dice\na,1\n", "not a table of cases"),
        ("summary.json", "[1]", "no mapping"),
        ("summary.json", '{"a":' * 100_000, "not the summary"),
        ("inputs.json", '{"cases": [{"case": 1}]}', "not a list of inputs"),
        ("inputs.json", '{"cases": 3}', "not a list of inputs"),
        ("inputs.json", "[]", "not a list of inputs"),
        (
            "inputs.json",
            '{"cases": [{"case": "a", "group": "a", "root": "", "image": "x\\u0000", "truth": 1, "prediction": null}]}',
            "not a list of inputs",
        ),
    ],
)
def test_what_cannot_be_read_is_told_in_a_few_lines(scored, file, content, message):
    if file is None:
        scored = scored / "nowhere"
    elif content is None:
        (scored / file).unlink()
    else:
        (scored / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_scored(scored)
    assert len(str(caught.value).splitlines()) <= 6
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("labels", [None, {}, {"labels": {"a": 0}}, {"labels": {"a": 0, "b": 1}, "x": 1}, [1]])
def test_a_summary_without_labels_is_told_when_they_are_asked_for(scored, labels):
    write_summary(scored, {"labels": labels})
    with pytest.raises(UserError, match=r"summary\.json"):
        _ = read_scored(scored).labels


def test_the_files_of_a_case_are_read_and_checked(tmp_path):
    truth = np.zeros((30, 40), np.uint8)
    truth[5:20, 8:30] = 255
    write_png(tmp_path / "image.png", np.full((30, 40), 7, np.uint8))
    write_png(tmp_path / "truth.png", truth)
    write_png(tmp_path / "small.png", truth[:, :-1])
    entry = Input("a", "a", "r", tmp_path / "image.png", tmp_path / "truth.png", tmp_path / "truth.png")
    image, true, predicted = load_case(entry, LABELS)
    assert image.shape == (30, 40, 3)
    assert set(np.unique(true)) == {0, 1}
    assert np.array_equal(true, predicted)
    bare = Input("a", "a", "r", None, tmp_path / "truth.png", None)
    assert load_case(bare, LABELS)[::2] == (None, None)
    for wrong, message in (
        (Input("a", "a", "r", None, tmp_path / "truth.png", tmp_path / "small.png"), "39 x 30 pixels"),
        (Input("a", "a", "r", tmp_path / "small.png", tmp_path / "truth.png", None), "39 x 30 pixels"),
        (Input("a", "a", "r", None, tmp_path / "gone.png", None), "no such file"),
        (Input("a", "a", "r", None, None, None), "names no true mask"),
        (Input("a", "a", PHANTOM, None, None, None), "no such case"),
    ):
        with pytest.raises(UserError, match=message):
            load_case(wrong, LABELS)


def test_a_case_of_the_phantom_is_drawn_again():
    image, truth, prediction = load_case(Input("phantom_0003", "g", PHANTOM, None, None, None), LABELS)
    assert np.array_equal(image, embedded()["phantom_0003"][0])
    assert np.array_equal(truth * 255, embedded()["phantom_0003"][1])
    assert prediction is None


def test_no_case_is_chosen_twice_and_undefined_ones_never():
    rows = [row(name, value) for name, value in (("a", 0.9), ("b", None), ("c", 0.1), ("d", 0.5), ("e", 0.4))]
    rows += [row("c", 0.3, group="other"), row("c", 0.5, kind="second", group="other")]
    assert choose(rows, 1) == {
        "worst-1": (("c", "c"), 0.1),
        "best-1": (("a", "a"), 0.9),
        "median-1": (("e", "e"), 0.4),
    }
    assert len({key for key, _ in choose(rows, 3).values()}) == 5
    assert [key for key, _ in choose(rows, 3).values()][:3] == [("c", "c"), ("other", "c"), ("e", "e")]
    as_read = [{k: "" if v is None else str(v) for k, v in r.items()} for r in rows]
    assert choose(as_read, 3) == choose(rows, 3)


def test_overlays_are_replaced_and_need_no_image(tmp_path):
    image, mask = np.full((40, 50, 3), 90, np.uint8), np.zeros((40, 50), np.uint8)
    mask[10:20, 10:30] = 255
    write_png(tmp_path / "i.png", image)
    write_png(tmp_path / "t.png", mask)
    write_png(tmp_path / "overlays" / "worst-9-old.png", image)
    write_png(tmp_path / "overlays" / "own.png", image)
    files = (tmp_path / "i.png", tmp_path / "t.png", None)
    inputs = {("g", "x/y"): Input("x/y", "g", "r", *files), ("h", "z"): Input("z", "h", "r", None, files[1], None)}
    write_overlays(tmp_path, [row("x/y", 0.0, group="g"), row("z", 0.5, group="h")], inputs, LABELS)
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {
        f"worst-1-{safe_name('x/y')}.png",
        "worst-2-z.png",
        "own.png",
    }


def test_scored_folders_are_read_without_torch():
    code = "import sys, visattn.scored; assert 'torch' not in sys.modules; assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
