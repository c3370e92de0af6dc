"""`visattn evaluate` on a table of probabilities."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from visattn.cli import main
from visattn.metrics.classes import ClassTable


def predictions(path, cases, names=("cat", "=dog"), seed=0):
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(names)), len(cases))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["case", "prediction", *(f"p_{name}" for name in names)])
        writer.writerows([case, "", *row] for case, row in zip(cases, shares, strict=True))
    return shares


def table(path, rows, columns=("image", "label", "group")):
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([columns, *rows])
    return path


CASES = [f"a/{number}" for number in range(12)]
TRUE = [("cat", "=dog")[number % 3 == 0] for number in range(12)]


def means(folder):
    return json.loads((folder / "summary.json").read_text())["means"]


def test_a_table_is_scored_as_a_run_is(tmp_path, capsys):
    shares = predictions(tmp_path / "out" / "predictions.csv", CASES[::-1])[::-1]
    rows = [(f"{case}.png", name, f"g{i // 2}") for i, (case, name) in enumerate(zip(CASES, TRUE, strict=True))]
    truth = table(tmp_path / "truth.csv", rows)
    assert main(["evaluate", str(tmp_path / "out" / "predictions.csv"), str(truth)]) == 0
    folder = tmp_path / "out" / "evaluation"
    wanted = ClassTable(("cat", "=dog"), shares, np.array([name == "=dog" for name in TRUE]).astype(np.int64))
    for key, value in wanted.means().items():
        assert means(folder)[key] == pytest.approx(value, nan_ok=True), key
    text = capsys.readouterr().out
    assert "12 cases in 6 groups" in text
    assert "AUC" in text
    assert "Balanced accuracy" in (folder / "report.html").read_text()
    assert main(["evaluate", str(tmp_path / "out" / "predictions.csv"), str(truth)]) == 0, "its own results give way"
    predictions(tmp_path / "other.csv", CASES, seed=1)
    assert main(["evaluate", str(tmp_path / "other.csv"), str(truth), "--output", str(tmp_path / "second")]) == 0
    assert main(["compare", str(folder), str(tmp_path / "second")]) == 0


def test_class_folders_and_files_of_medmnist(tmp_path):
    for name, number in (("cat", 0), ("cat", 1), ("dog", 2), ("dog", 3)):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / "in" / name / f"{number}.png")
    predictions(tmp_path / "p.csv", ["cat/0", "cat/1", "dog/2", "dog/3"], ("cat", "dog"))
    assert main(["evaluate", str(tmp_path / "p.csv"), str(tmp_path / "in"), "--output", str(tmp_path / "one")]) == 0
    assert means(tmp_path / "one")["all/accuracy"] is not None
    content = {}
    for part in ("train", "val", "test"):
        content[f"{part}_images"] = np.zeros((4, 8, 8), np.uint8)
        content[f"{part}_labels"] = np.array([[0], [1], [1], [0]])
    np.savez(tmp_path / "mine.npz", **content)
    shares = predictions(tmp_path / "q.csv", [f"test_{number:05d}" for number in range(4)], ("x", "y"))
    assert (
        main(["evaluate", str(tmp_path / "q.csv"), str(tmp_path / "mine.npz"), "--output", str(tmp_path / "two")]) == 0
    )
    wanted = ClassTable(("x", "y"), shares, np.array([0, 1, 1, 0])).means()
    assert means(tmp_path / "two")["all/auc"] == pytest.approx(wanted["all/auc"])


def test_several_labels(tmp_path):
    shares = predictions(tmp_path / "p.csv", ["a", "b", "c"], ("x", "y"))
    truth = table(tmp_path / "t.csv", [("a.png", "x|y"), ("b.png", ""), ("c.png", "y")], ("image", "label"))
    assert main(["evaluate", str(tmp_path / "p.csv"), str(truth), "--multi_label"]) == 0
    page = (tmp_path / "evaluation" / "report.html").read_text()
    assert "<bdi>yes</bdi> predicted" in page
    assert "Predicted classes" in page
    assert "<bdi>inside</bdi>" not in page, "what is said of masks"
    wanted = ClassTable(("x", "y"), shares, np.array([[1, 1], [0, 0], [0, 1]])).means()
    assert means(tmp_path / "evaluation")["all/auc"] == pytest.approx(wanted["all/auc"])


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    predictions(tmp_path / "p.csv", CASES)
    rows = [(f"{case}.png", name, "") for case, name in zip(CASES, TRUE, strict=True)]
    truth = table(tmp_path / "truth.csv", rows)

    def refused(prediction, true, *words, more=()):
        assert main(["evaluate", str(prediction), str(true), *more]) == 2
        text = capsys.readouterr().err
        assert all(word in text for word in words), text
        assert not (tmp_path / "evaluation").exists()

    refused(tmp_path / "p.csv", table(tmp_path / "few.csv", rows[:10]), "2 cases not in", "a/10")
    refused(tmp_path / "p.csv", table(tmp_path / "more.csv", [*rows, ("b.png", "cat", "")]), "1 cases not in", ": b")
    refused(tmp_path / "p.csv", table(tmp_path / "cow.csv", [*rows[:11], (rows[11][0], "cow", "")]), "cow")
    refused(tmp_path / "p.csv", truth, "--labels: is for masks", more=["--labels", "x.yaml"])
    refused(tmp_path / "p.csv", truth, "--tolerance: is for masks", more=["--tolerance", "1"])
    text = (tmp_path / "p.csv").read_text().splitlines()
    for line, word in (("a/0,,1.5,0.1", "line 2"), ("a/0,,nan,0.1", "line 2"), ("a/1,,0.5,0.5", "stands twice")):
        (tmp_path / "bad.csv").write_text("\n".join([text[0], line, *text[2:]]))
        refused(tmp_path / "bad.csv", truth, word)
    (tmp_path / "none.csv").write_text("case,x\na,1\n")
    refused(tmp_path / "none.csv", truth, "a column p_NAME")
    assert main(["evaluate", str(tmp_path), str(truth)]) == 2
    text = capsys.readouterr().err
    assert "masks need --labels" in text
    assert "predictions.csv" not in text
    predictions(tmp_path / "out" / "predictions.csv", CASES)
    assert main(["evaluate", str(tmp_path / "out"), str(truth)]) == 2
    assert f"give {tmp_path / 'out' / 'predictions.csv'}" in capsys.readouterr().err


def test_images_of_one_folder_pair_with_class_folders_by_stem(tmp_path, capsys):
    for name, number in (("cat", 0), ("dog", 1), ("cat", 2), ("dog", 3)):
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(tmp_path / "in" / name / f"{number}.png")
    shares = predictions(tmp_path / "flat.csv", ["0", "1", "2", "3"], ("cat", "dog"))
    call = ["evaluate", str(tmp_path / "flat.csv"), str(tmp_path / "in"), "--output", str(tmp_path / "flat")]
    assert main(call) == 0
    wanted = ClassTable(("cat", "dog"), shares, np.array([0, 1, 0, 1])).means()
    assert means(tmp_path / "flat")["all/auc"] == pytest.approx(wanted["all/auc"])
    with (tmp_path / "flat" / "cases.csv").open() as handle:
        assert {row["case"] for row in csv.DictReader(handle)} == {"cat/0", "cat/2", "dog/1", "dog/3"}

    predictions(tmp_path / "twice.csv", ["a/0", "b/0", "1", "2", "3"], ("cat", "dog"))
    assert main(["evaluate", str(tmp_path / "twice.csv"), str(tmp_path / "in")]) == 2
    Image.new("L", (8, 8), 9).save(tmp_path / "in" / "dog" / "0.png")
    assert main(call) == 2, "two true cases of one stem: which is meant is not known"
    assert "different cases" in capsys.readouterr().err


def test_torch_is_not_loaded():
    code = "import sys, visattn.evaluate_classes; assert not {'torch', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
