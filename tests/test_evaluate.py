import csv
import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from visattn.cli import main
from visattn.data.phantom import write_phantom
from visattn.errors import UserError
from visattn.evaluate import evaluate_folder, score_pair
from visattn.evaluate_output import default_output
from visattn.evaluate_plan import Pair, plan_pairs, read_labels
from visattn.labels import Labels
from visattn.metrics import SUITES, case_metrics
from visattn.scored import read_cases, read_scored, read_summary

LABELS = "background: 0\npolyp: 255\n"


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)


def square(top, left, size=10, shape=(40, 50), value=255):
    mask = np.zeros(shape, np.uint8)
    mask[top : top + size, left : left + size] = value
    return mask


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """pred/ and gt/ of five cases, each moved by another distance; the last truth is empty and found empty."""
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        write(tmp_path / "gt" / f"p{number // 2}_{number}.png", square(10, 10))
        write(tmp_path / "pred" / f"p{number // 2}_{number}.png", square(10, 10 + number))
    write(tmp_path / "gt" / "p9_9.png", square(0, 0, 0))
    write(tmp_path / "pred" / "p9_9.png", square(0, 0, 0))
    (tmp_path / "labels.yaml").write_text(LABELS)
    return tmp_path


def evaluate(*more):
    return main(["evaluate", "pred", "gt", "--labels", "labels.yaml", *more])


def told(capsys):
    error = capsys.readouterr().err
    assert error.startswith("visattn: error: ")
    assert len(error.strip().splitlines()) <= 6
    return error


def everything(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_the_scored_folder_holds_what_case_metrics_says(folders, capsys):
    before = everything(folders)
    assert evaluate() == 0
    output = folders / "pred" / "evaluation"
    assert sorted(p.name for p in output.iterdir()) == [
        "cases.csv",
        "inputs.json",
        "overlays",
        "report.html",
        "summary.json",
    ]
    scored = read_scored(output)
    labels = Labels.from_config({"background": 0, "polyp": 255})
    assert scored.labels == labels
    for number, row in enumerate(scored.rows[:4]):
        predicted, truth = (
            (cv2.imread(f"{side}/{row['case']}.png", cv2.IMREAD_GRAYSCALE) > 0).astype(np.uint8)
            for side in ("pred", "gt")
        )
        (expected,) = case_metrics(predicted, truth, labels, suite="surface")
        assert list(row) == ["case", "group", "class", "split", *SUITES["surface"]]
        assert row["case"] == row["group"] == f"p{number // 2}_{number}"
        assert {key: row[key] for key in expected} == {
            key: "" if value is None else f"{value:.6g}" for key, value in expected.items()
        }
    assert scored.rows[4]["dice"] == ""
    assert scored.rows[4]["fpr_empty"] == "0"
    mean = np.mean([1, 0.9, 0.8, 0.7])
    summary = scored.summary
    assert summary["means"]["polyp/dice"] == summary["means"]["mean/dice"] == pytest.approx(mean)
    assert (summary["means"]["cases"], summary["means"]["polyp/undefined"]) == (5, 1)
    missed = 10 + 20 + 30
    assert summary["confusion"] == {
        "names": ["background", "polyp"],
        "counts": [[5 * 2000 - 400 - missed, missed], [missed, 400 - missed]],
    }
    assert "checkpoint" not in summary
    assert (summary["prediction"], summary["truth"]) == ("pred", "gt")
    entry = scored.inputs["p0_0", "p0_0"]
    assert (entry.prediction, entry.truth, entry.image) == (
        folders / "pred" / "p0_0.png",
        folders / "gt" / "p0_0.png",
        None,
    )
    lines = {line.split("  ")[1].strip(): line.split() for line in capsys.readouterr().out.splitlines() if "  " in line}
    assert lines["Dice"][1:] == ["0.8500", lines["Dice"][2], "\u2013", lines["Dice"][4], "4"]
    assert float(lines["Dice"][2]) < 0.85 < float(lines["Dice"][4])
    assert {name: data for name, data in everything(folders).items() if "/evaluation/" not in name} == before


def test_a_second_evaluation_replaces_the_first_and_scores_no_overlay(folders):
    assert evaluate() == 0
    assert list((folders / "pred" / "evaluation" / "overlays").glob("worst-*.png"))
    first = everything(folders / "pred" / "evaluation")
    (folders / "pred" / "p0_0.png").write_bytes((folders / "pred" / "p1_3.png").read_bytes())
    assert evaluate() == 0
    second = everything(folders / "pred" / "evaluation")
    assert first["cases.csv"] != second["cases.csv"]
    assert read_summary(folders / "pred" / "evaluation" / "summary.json")["cases"] == 5
    assert evaluate("--output", "elsewhere/deep") == 0, "nor is the first one read as predictions"
    assert everything(folders / "elsewhere" / "deep")["cases.csv"] == second["cases.csv"]
    assert [p.name for p in folders.rglob(".*")] == []


def test_groups_widen_the_interval(folders, capsys):
    assert evaluate("--group_by", "^(p.)_") == 0
    assert "3 groups" in capsys.readouterr().err
    rows = read_cases(folders / "pred" / "evaluation" / "cases.csv")
    assert [row["group"] for row in rows] == ["p0", "p0", "p1", "p1", "p9"]
    (folders / "who.csv").write_text("file,patient\n" + "".join(f"{row['case']}.png,x\n" for row in rows))
    assert evaluate("--group_by", "who.csv:patient") == 0
    assert read_summary(folders / "pred" / "evaluation" / "summary.json")["metrics"][0]["low"] is None
    capsys.readouterr()
    assert evaluate("--group_by", "^(q.)_") == 2
    assert "--group_by: 5 of 5 cases" in told(capsys)


def test_missing_and_surplus_predictions_are_refused_by_name_or_counted(folders, capsys):
    (folders / "pred" / "p0_0.png").rename(folders / "pred" / "stranger.png")
    (folders / "pred" / "p9_9.png").unlink()
    before = everything(folders)
    assert evaluate() == 2
    error = told(capsys)
    assert "no prediction for 2: p0_0, p9_9" in error
    assert "no true mask for 1: stranger.png" in error
    assert everything(folders) == before
    assert evaluate("--missing", "miss") == 0
    said = capsys.readouterr().err
    assert "without prediction, counted as misses: 2: p0_0, p9_9" in said
    assert "stranger.png" in said
    scored = read_scored(folders / "pred" / "evaluation")
    rows = {row["case"]: row for row in scored.rows}
    assert len(rows) == 5
    assert rows["p0_0"]["dice"] == rows["p0_0"]["nsd"] == "0"
    assert rows["p0_0"]["hd95"] == f"{np.hypot(40, 50):.6g}"
    assert rows["p9_9"]["fpr_empty"] == "0"
    assert scored.summary["missing"] == ["p0_0", "p9_9"]
    assert scored.summary["extra"] == [os.path.join("pred", "stranger.png")]
    assert scored.inputs["p0_0", "p0_0"].prediction is None


def test_a_surplus_prediction_alone_is_refused_too(folders, capsys):
    write(folders / "pred" / "p7_7.png", square(1, 1))
    assert evaluate() == 2
    assert "no true mask for 1: p7_7.png" in told(capsys)
    assert evaluate("--missing", "miss") == 0
    assert len(read_cases(folders / "pred" / "evaluation" / "cases.csv")) == 5


def test_all_that_is_wrong_is_told_at_once(folders, capsys):
    write(folders / "pred" / "p0_0.png", square(10, 10, shape=(50, 40)))
    write(folders / "pred" / "p0_1.png", square(10, 10, value=1))
    whole = (folders / "pred" / "p1_2.png").read_bytes()
    (folders / "pred" / "p1_2.png").write_bytes(whole[:-20])
    (folders / "pred" / "p1_3.png").unlink()
    before = everything(folders)
    assert evaluate() == 2
    error = told(capsys)
    for text in ("4 problems in 5 cases", "no prediction for 1: p1_3", "p0_0.png: 40 x 50", "EXIF", "only 0 and 1"):
        assert text in error
    assert "truncated" in error
    assert everything(folders) == before, "nothing is written"
    assert evaluate("--missing", "miss") == 2, "a bad file is no miss"
    assert "3 problems" in told(capsys)


def test_many_problems_stay_within_six_lines(folders, capsys):
    for number in range(9):
        write(folders / "gt" / f"bad\x1b[31m{number}.png", square(1, 1))
        write(folders / "pred" / f"bad\x1b[31m{number}.png", square(1, 1, shape=(30, 30)))
    assert evaluate() == 2
    error = told(capsys)
    assert "9 problems" in error
    assert "... and 5 more" in error
    assert "\x1b" not in error


def test_an_output_that_is_not_ours_is_left_alone(folders, capsys):
    output = folders / "pred" / "evaluation"
    assert evaluate() == 0
    for name in ("notes.txt", "overlays/mine.png"):
        (output / name).write_text("mine")
        before = everything(folders)
        capsys.readouterr()
        assert evaluate() == 2
        assert "--output pred/evaluation: holds something other" in told(capsys)
        assert everything(folders) == before
        (output / name).unlink()
    (output / ".DS_Store").write_text("")
    assert evaluate() == 0
    for target in ("gt", "labels.yaml", "."):
        capsys.readouterr()
        assert evaluate("--output", target) == 2
        told(capsys)
    (folders / "other").mkdir()
    (folders / "other" / "cases.csv").write_text("case,class\n")
    assert evaluate("--output", "other") == 2
    (folders / "empty").mkdir()
    assert evaluate("--output", "empty") == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_is_told(folders, capsys):
    (folders / "pred").chmod(0o555)
    assert evaluate() == 2
    assert "cannot be written" in told(capsys)
    (folders / "pred").chmod(0o755)


def test_an_output_that_cannot_be_written_is_told_before_anything_is_scored(folders, capsys, monkeypatch):
    monkeypatch.setattr("visattn.evaluate.score_pair", lambda *args: pytest.fail("scored before the output was tried"))
    (folders / "file").write_text("")
    assert evaluate("--output", "file/results") == 2
    assert "--output file/results: cannot be written" in told(capsys)


@pytest.mark.parametrize("step", ["write_summary", "write_overlays", "write_report"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_when_writing_fails_the_earlier_results_stay(folders, capsys, monkeypatch, step, error):
    assert evaluate() == 0
    before = everything(folders)
    (folders / "pred" / "p0_0.png").write_bytes((folders / "pred" / "p1_3.png").read_bytes())
    before["pred/p0_0.png"] = (folders / "pred" / "p0_0.png").read_bytes()

    def fail(*args):
        raise error

    monkeypatch.setattr(f"visattn.evaluate.{step}", fail)
    capsys.readouterr()
    assert evaluate() == (2 if isinstance(error, OSError) else 130)
    if isinstance(error, OSError):
        assert "No space left" in told(capsys)
    assert everything(folders) == before
    assert evaluate("--output", "new/deep") != 0
    assert not (folders / "new").exists()


def keys(plan):
    return [(pair.name, pair.prediction and pair.prediction.name) for pair in plan.pairs]


def plan(folders, pred="pred", gt="gt", images=None):
    return plan_pairs(folders / pred, folders / gt, images and folders / images, folders / "out")


def put(folder, *names):
    for name in names:
        write(folder / name, square(5, 5))


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [
        (["a.png", "b.bmp"], ["a.jpg", "b.jpg"], ["a", "b"]),
        (["a_mask.png", "b_mask.png"], ["a_segmentation.png", "b_segmentation.png"], ["a", "b"]),
        (["a/a_trans.png", "b/b_trans.png"], ["a.png", "b.png"], ["a", "b"]),  # MONAI's SaveImage
        (["s1/1.png", "s2/1.png"], ["s1/1.png", "s2/1.png"], ["s1/1", "s2/1"]),
        (["s1/1.png", "s2/1.png"], ["s1/masks/1.png", "s2/masks/1.png"], ["s1/1", "s2/1"]),
        (["x/1.png", "y/2.png"], ["z/1.png", "2.png"], ["1", "2"]),
        (["a.png", "b.png"], ["deep/a.png", "deep/b.png"], ["a", "b"]),
        (["u\u0308.png"], ["\u00fc.png"], ["\u00fc"]),  # as macOS and as Linux write it
        (["a.v2.png"], ["a.v2.tif"], ["a.v2"]),
        ([".hidden.png", "a.png", "plans.json"], ["a.png"], ["a"]),
    ],
)
def test_names_that_differ_as_tools_make_them_differ_pair(tmp_path, predicted, true, expected):
    for name in predicted:
        if name.endswith(".json"):
            (tmp_path / "pred" / name).write_text("{}")
        else:
            put(tmp_path / "pred", name)
    put(tmp_path / "gt", *true)
    if "masks" in true[0]:
        put(tmp_path / "gt", *(name.replace("masks", "images") for name in true))
    found = plan(tmp_path)
    assert [pair.name for pair in found.pairs] == expected
    assert (found.missing, found.extra, found.problems) == ((), (), ())
    for pair in found.pairs:
        assert pair.prediction is not None
        assert (pair.image is not None) == ("masks" in true[0])


def test_an_ending_of_some_masks_is_part_of_their_names(tmp_path):
    put(tmp_path / "gt", "a.png", "a_mask.png")
    put(tmp_path / "pred", "a.png", "a_mask.png")
    assert keys(plan(tmp_path)) == [("a", "a.png"), ("a_mask", "a_mask.png")]


def test_a_data_set_is_a_truth_with_images(tmp_path):
    write_phantom(tmp_path / "gt", 2, 0, (32, 32))
    put(tmp_path / "pred", "phantom_0000.png", "phantom_0001.png")
    (first, second) = plan(tmp_path).pairs
    assert first.truth == tmp_path / "gt" / "masks" / "phantom_0000.png"
    assert second.image == tmp_path / "gt" / "images" / "phantom_0001.png"
    (first, _) = plan(tmp_path, gt="gt/masks").pairs
    assert first.image is None
    (first, _) = plan(tmp_path, gt="gt/masks", images="gt").pairs
    assert first.image == tmp_path / "gt" / "images" / "phantom_0000.png"


def test_what_predict_and_evaluate_write_beside_masks_is_no_mask(tmp_path):
    put(tmp_path / "gt", "a.png", "b.png")
    put(tmp_path / "pred", "a.png", "overlays/a.png", "probabilities/a_prob.png", "old/overlays/a.png")
    put(tmp_path / "pred", "overlays/c.png")
    found = plan(tmp_path)
    assert [path.name for path in found.extra] == ["a.png", "a.png", "c.png", "a_prob.png"], "of an unknown tool"
    (tmp_path / "pred" / "manifest.json").write_text("{}")
    for name in ("cases.csv", "summary.json"):
        (tmp_path / "pred" / "old" / name).write_text("")
    assert keys(plan(tmp_path)) == [("a", "a.png"), ("b", None)]
    assert plan(tmp_path).extra == ()


def test_the_masks_that_predict_wrote_are_what_is_scored(tmp_path):
    """`predict` takes none of them for images, going by its manifest."""
    put(tmp_path / "gt", "a.png")
    put(tmp_path / "pred", "a.png", "overlays/a.png")
    made = {"cases": [{"mask": "a.png", "files": {"a.png": "", "overlays/a.png": ""}}]}
    (tmp_path / "pred" / "manifest.json").write_text(json.dumps(made))
    assert keys(plan(tmp_path)) == [("a", "a.png")]
    assert plan(tmp_path).extra == ()


def test_a_case_is_called_as_the_true_mask_spells_it(tmp_path):
    """A run on the same data calls it so as well, and `compare` goes by names."""
    put(tmp_path / "gt", "u\u0308.png", "deep/e\u0301_1.png")
    put(tmp_path / "pred", "\u00fc.png", "\u00e9_1.png")
    assert keys(plan(tmp_path)) == [("e\u0301_1", "\u00e9_1.png"), ("u\u0308", "\u00fc.png")]
    put(tmp_path / "gt", "\u00fc.png")
    assert "have the same stem" in plan(tmp_path).problems[0]


def test_files_whose_names_are_no_text_are_scored(folders):
    for side in ("pred", "gt"):
        os.rename(f"{side}/p0_0.png", os.fsencode(side) + b"/\xff.png")
    assert evaluate() == 0
    scored = read_scored(folders / "pred" / "evaluation")
    assert {row["case"] for row in scored.rows} >= {"\udcff", "p0_1"}
    assert scored.inputs["\udcff", "\udcff"].truth.is_file()


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([], ["a.png"], "no image in this folder"),
        (["a.png"], None, "no such file or folder"),
        (["a.png"], ["b.png"], "no file there has the name of a true mask"),
        (["1.png"], ["s1/1.png", "s2/1.png"], "s2/1.png share one. Give both folders the same subfolders"),
        (["v.nii.gz"], ["a.png"], "volumes"),
    ],
)
def test_folders_that_cannot_be_paired_are_told(tmp_path, predicted, true, message):
    (tmp_path / "pred").mkdir()
    for name in predicted:
        if name.endswith(".gz"):
            (tmp_path / "pred" / name).write_text("")
        else:
            put(tmp_path / "pred", name)
    if true is not None:
        put(tmp_path / "gt", *true)
    with pytest.raises(UserError, match=message) as caught:
        plan(tmp_path)
    assert len(str(caught.value).splitlines()) <= 6


def test_two_files_of_one_stem_are_both_named(tmp_path):
    put(tmp_path / "gt", "a.png")
    put(tmp_path / "pred", "a.png", "a.bmp")
    (problem,) = plan(tmp_path).problems
    assert "a.bmp and " in problem
    assert "a.png have the same stem" in problem


def test_the_masks_of_a_run_are_scored_beside_it(tmp_path):
    put(tmp_path / "run" / "masks", "a.png")
    put(tmp_path / "gt", "a.png")
    assert default_output(tmp_path / "run" / "masks") == tmp_path / "run" / "masks" / "evaluation"
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert default_output(tmp_path / "run" / "masks") == tmp_path / "run" / "evaluation"
    with pytest.raises(UserError, match="is a run folder"):
        plan(tmp_path, pred="run")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LABELS, {"labels": {"background": 0, "polyp": 255}, "regions": {}, "ignore": []}),
        (
            "labels: {background: 0, rim: 1, core: 2}\nregions: {whole: [rim, core], core: [core]}\nignore: 9\n",
            {
                "labels": {"background": 0, "rim": 1, "core": 2},
                "regions": {"whole": ["rim", "core"], "core": ["core"]},
                "ignore": [9],
            },
        ),
        ("{background: 0, labels: 7}", {"labels": {"background": 0, "labels": 7}, "regions": {}, "ignore": []}),
    ],
)
def test_labels_are_the_recipes_block_alone(tmp_path, text, expected):
    (tmp_path / "labels.yaml").write_text(text)
    assert read_labels(tmp_path / "labels.yaml").to_config() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file"),
        ("", "needs names with their values"),
        ("- 1\n", "needs names with their values"),
        ("background: 0\nbackground: 1\n", "stands twice"),
        ("background: 0\npolyp: red\n", "'red' is no value"),
        ("background: 0\npolyp: 255\nignore: 128\n", "'ignore' stands among the names"),
        ("labels: {background: 0, polyp: 255}\nignor: 3\n", "Did you mean 'ignore'"),
        ("labels: {background: 0, mean: 255}\n", "'mean'"),
        ("data: {init_args: {labels: {background: 0, polyp: 255}}}\n", "is a recipe"),
        ("class_path: os.system\n", "is a recipe"),
        ("!!python/object/apply:os.system [ls]\n", "not valid YAML"),
        ("a: &a [1]\nb: *a\n", "aliases"),
        ("\udcff", "no text"),
    ],
)
def test_labels_that_are_no_good_are_told(tmp_path, text, message):
    if text is not None:
        (tmp_path / "labels.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message) as caught:
        read_labels(tmp_path / "labels.yaml")
    assert len(str(caught.value).splitlines()) <= 6
    assert "labels.yaml" in str(caught.value)


def scores(tmp_path, predicted, truth, labels):
    write(tmp_path / "p.png", predicted)
    write(tmp_path / "t.png", truth)
    return score_pair(Pair("c", tmp_path / "t.png", tmp_path / "p.png", None), labels)


def test_grey_values_take_the_nearest_label_and_it_is_said(folders, capsys):
    soft = cv2.GaussianBlur(square(10, 10).astype(np.float32), (0, 0), 2)
    write(folders / "pred" / "p0_0.png", np.round(soft).astype(np.uint8))
    assert evaluate() == 0
    assert "that the labels do not name (soft edges, JPEG, probabilities): 1;" in capsys.readouterr().err
    counted = int((np.round(soft) > 127).sum())
    assert 60 < counted < 100
    rows = read_cases(folders / "pred" / "evaluation" / "cases.csv")
    assert float(rows[0]["recall"]) == counted / 100


def test_ignored_pixels_count_for_nothing_and_no_prediction_may_claim_them(tmp_path):
    labels = Labels.from_config({"background": 0, "polyp": 255}, ignore=128)
    truth, predicted = square(10, 10), square(10, 10)
    truth[:8] = 128
    predicted[:8] = 255
    scored = scores(tmp_path, predicted, truth, labels)
    assert scored.rows[0]["dice"] == 1
    assert scored.confusion.sum() == truth.size - 8 * 50
    predicted[:8] = 128
    assert scores(tmp_path, predicted, truth, labels).rows == scored.rows
    predicted[:9] = 128
    assert "holds the value to ignore in 50 pixels" in scores(tmp_path, predicted, truth, labels)


def test_regions_are_scored_each_by_itself(tmp_path):
    labels = Labels.from_config(
        {"background": 0, "rim": 1, "core": 2}, regions={"whole": ["rim", "core"], "core": ["core"]}
    )
    truth = square(10, 10, 20, value=1)
    truth[15:20, 15:20] = 2
    predicted = truth.copy()
    predicted[15:20, 15:20] = 1
    scored = scores(tmp_path, predicted, truth, labels)
    assert [row["dice"] for row in scored.rows] == [1, 0]
    assert scored.confusion.tolist() == [[[1600, 0], [0, 400]], [[1975, 0], [25, 0]]]


def test_several_classes_are_printed_with_their_mean(folders, capsys):
    (folders / "labels.yaml").write_text("labels: {background: 0, '[red]a[/red]': 100, b: 200}\n")
    for path in (folders / "gt").iterdir():
        write(path, square(5, 5, value=100) + square(25, 25, value=200))
        write(folders / "pred" / path.name, square(5, 5, value=100))
    assert evaluate() == 0
    out = capsys.readouterr().out
    order = [out.index(text) for text in ("[red]a[/red]", " b ", "mean of the classes")]
    assert order == sorted(order)
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  Dice")] == ["1.0000", "0.0000", "0.5000"]
    summary = read_summary(folders / "pred" / "evaluation" / "summary.json")
    assert summary["means"]["mean/dice"] == 0.5
    assert summary["confusion"]["counts"] == [[1800 * 5, 0, 0], [0, 500, 0], [500, 0, 0]]


def test_images_make_overlays(folders, capsys):
    for path in (folders / "gt").iterdir():
        write(folders / "img" / f"{path.stem}.jpg", np.full((40, 50, 3), 200, np.uint8))
    assert evaluate("--images", "img") == 0
    scored = read_scored(folders / "pred" / "evaluation")
    assert scored.inputs["p0_0", "p0_0"].image == folders / "img" / "p0_0.jpg"
    (worst,) = (folders / "pred" / "evaluation" / "overlays").glob("worst-1-*.png")
    assert worst.name == "worst-1-p1_3.png"
    assert np.median(cv2.imread(str(worst))) == 200
    write(folders / "img" / "p0_0.jpg", np.zeros((40, 51, 3), np.uint8))
    capsys.readouterr()
    assert evaluate("--images", "img") == 2
    assert "p0_0.jpg: 51 x 40" in told(capsys)
    assert evaluate("--images", "pred/evaluation") == 2
    (folders / "img" / "p0_0.jpg").unlink()
    capsys.readouterr()
    assert evaluate("--images", "img") == 0
    assert "cases without image, shown on a plain ground: 1" in capsys.readouterr().err
    assert evaluate("--images", "img/p0_1.jpg") == 2
    assert "is a file; name the folder" in told(capsys)


def test_memory_does_not_grow_with_the_images_that_wait(monkeypatch):
    from visattn import evaluate as module

    started, done = [], []

    def slow(item):
        started.append(item)
        return item

    for result in module._in_order(slow, range(500), 4):
        done.append(result)
        assert max(started) - result <= 2 * 8 + 1 + 8
    assert done == list(range(500))


def test_it_starts_without_torch(folders):
    code = (
        "import sys\nfrom visattn.cli import main\n"
        "assert main(['evaluate', 'pred', 'gt', '--labels', 'labels.yaml']) == 0\n"
        "assert not {'torch', 'lightning', 'timm', 'monai'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with (folders / "pred" / "evaluation" / "cases.csv").open() as handle:
        assert len(list(csv.DictReader(handle))) == 5
    assert json.loads((folders / "pred" / "evaluation" / "summary.json").read_text())["cases"] == 5


def test_from_python_paths_may_be_text(folders):
    assert evaluate_folder("pred", "gt", "labels.yaml", output="here") == 0
    assert (folders / "here" / "report.html").is_file()
