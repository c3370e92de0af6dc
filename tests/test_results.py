import csv
import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from visattn import results
from visattn.data.cases import Case
from visattn.data.phantom import phantom_images
from visattn.data.phantoms import PHANTOM, PHANTOM_SEED
from visattn.errors import UserError
from visattn.labels import IGNORE, Labels
from visattn.metrics import SUITES, SegmentationMetrics, case_metrics
from visattn.overlay import write_png
from visattn.scored import load_case, read_scored, safe_name

BINARY = Labels.from_config({"background": 0, "polyp": 255})
THREE = Labels.from_config({"background": 0, "rim": 300, "core": [700, 701]}, ignore=9)
REGIONS = Labels.from_config(
    {"background": 0, "rim": 1, "core": 2}, regions={"whole": ["rim", "core"], "centre": ["core"]}
)


def probabilities_of(labels, number, shape):
    generator = np.random.default_rng(number)
    logits = np.stack([gaussian_filter(generator.normal(size=shape), 3) * 20 for _ in range(labels.channels)])
    maps = np.exp(logits) / np.exp(logits).sum(axis=0) if labels.activation == "softmax" else 1 / (1 + np.exp(-logits))
    return maps.astype(np.float32)


def truth_of(labels, number, shape):
    truth = labels.from_probabilities(probabilities_of(labels, number + 100, shape))
    if labels.ignore:
        truth[:2] = IGNORE
    return truth


def score(folder, data, labels, names, skip=()):
    """What a run does with its validation cases, without a network; returns task and data module."""
    metrics = SegmentationMetrics(labels, "full")
    task = task_of(labels, metrics)
    results.start_scoring(folder, task)
    cases = []
    for number, name in enumerate(names):
        shape = (30 + number, 41)
        image, mask = data / "images" / f"{number}.png", data / "masks" / f"{number}.png"
        truth = truth_of(labels, number, shape)
        write_png(image, np.full((*shape, 3), 90, np.uint8))
        write_png(mask, labels.decode(truth))
        cases.append(Case(name, image, mask, f"group {number // 2}", str(data)))
        if name in skip:
            continue
        probabilities = probabilities_of(labels, number, shape)
        predicted = labels.from_probabilities(probabilities)
        metrics.update(name, predicted, truth, probabilities, group=cases[-1].group)
        write_png(task.masks / f"{safe_name(name)}.png", labels.decode(predicted))
    module = SimpleNamespace(cases={"val": cases}, description="made up", fingerprint="f00d")
    return task, module


def task_of(labels, metrics):
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    return SimpleNamespace(
        labels=labels, validation_metrics=metrics, recipe_name="some", suite="", masks=None, trainer=trainer
    )


def finish(folder, task, module):
    return results.write_results(folder, task, module, "val", folder / "checkpoints" / "best.ckpt", 1.0, 0)


NAMES = ["plain", "a/b", "a_b", "x" * 300, "<script>", "名前"]


@pytest.mark.parametrize("labels", [BINARY, THREE, REGIONS], ids=["binary", "three", "regions"])
def test_the_folder_holds_the_masks_that_were_scored(labels, tmp_path):
    run = tmp_path / "run"
    task, module = score(run, tmp_path / "data", labels, NAMES)
    assert not (run / "masks").exists(), "nothing under its final name before all cases are scored"
    report = finish(run, task, module)
    assert report == run / "report.html"
    assert not list(run.glob(".*"))
    scored = read_scored(run)
    assert scored.labels == labels
    assert len(scored.inputs) == len({entry.prediction for entry in scored.inputs.values()}) == len(NAMES)
    assert sorted(path.name for path in (run / "masks").iterdir()) == sorted(f"{safe_name(n)}.png" for n in NAMES)
    for number, name in enumerate(NAMES):
        entry = scored.inputs[f"group {number // 2}", name]
        assert entry.prediction.parent == run / "masks"
        values = cv2.imread(str(entry.prediction), cv2.IMREAD_UNCHANGED)
        assert values.dtype == (np.uint16 if labels is THREE else np.uint8)
        assert set(np.unique(values)) <= {own[0] for own in labels.values}
        image, truth, predicted = load_case(entry, labels)
        assert image.shape == (*truth.shape, 3)
        # The same scores from the files alone.
        again = case_metrics(predicted, truth, labels, suite="surface")
        for row, scores in zip([row for row in scored.rows if row["case"] == name], again, strict=True):
            for key in SUITES["surface"]:
                assert float(row[key] or "nan") == pytest.approx(
                    np.nan if scores[key] is None else scores[key], rel=1e-5, nan_ok=True
                )
    summary = scored.summary
    assert summary["confusion"] == task.validation_metrics.confusion()
    assert set(summary["calibration"]) == set(labels.foreground)
    assert all(0 <= entry["ece"] <= 1 for entry in summary["calibration"].values())
    assert len(list((run / "overlays").glob("*.png"))) == 6


def test_evaluate_of_the_masks_gives_the_same_rows(tmp_path):
    from visattn.evaluate import evaluate_folder

    run, data = tmp_path / "run", tmp_path / "data"
    finish(run, *score(run, data, BINARY, [str(number) for number in range(4)]))
    (tmp_path / "labels.yaml").write_text("background: 0\npolyp: 255\n")
    evaluate_folder(run / "masks", data / "masks", tmp_path / "labels.yaml", output=tmp_path / "scores")
    tables = []
    for folder in (run, tmp_path / "scores"):
        with (folder / "cases.csv").open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        tables.append([[row[key] for key in ("case", "class", *SUITES["surface"])] for row in rows])
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4


def test_scoring_again_replaces_the_masks(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    finish(run, *score(run, data, BINARY, ["a", "b", "c"]))
    before = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    task, module = score(run, data, BINARY, ["c", "d"])
    part = task.masks
    now = {path.name: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.parent != part}
    assert now == before, "until all is scored, the earlier results stay whole"
    finish(run, task, module)
    assert {path.name for path in (run / "masks").iterdir()} == {"c.png", "d.png"}
    assert {case for _, case in read_scored(run).inputs} == {"c", "d"}
    assert {path.stem.split("-")[-1] for path in (run / "overlays").iterdir()} == {"c", "d"}


def test_what_a_killed_scoring_left_does_not_come_back(tmp_path):
    run, data = tmp_path / "run", tmp_path / "data"
    score(run, data, BINARY, ["old"])  # killed here
    finish(run, *score(run, data, BINARY, ["new", "never scored"], skip=["never scored"]))
    assert {path.name for path in (run / "masks").iterdir()} == {"new.png"}
    inputs = {case: entry.prediction for (_, case), entry in read_scored(run).inputs.items()}
    assert inputs["never scored"] is None


def test_masks_of_somebody_else_are_never_replaced(tmp_path):
    data = tmp_path / "data"
    task, module = score(data / "run", data, BINARY, ["0", "1"])
    before = [path.read_bytes() for path in sorted((data / "masks").iterdir())]
    for stage in (lambda: results.start_scoring(data, task), lambda: results.earlier_masks(data)):
        with pytest.raises(UserError, match="holds 2 files that"):
            stage()
    (data / ".masks.part").mkdir()
    with pytest.raises(UserError, match="another --run"):
        finish(data, task, module)
    assert [path.read_bytes() for path in sorted((data / "masks").iterdir())] == before
    # A list that names files outside is no leave to remove them.
    entry = {"case": "0", "group": "", "root": "", "image": None, "truth": None, "prediction": "../data/masks/0.png"}
    (data / "other").mkdir()
    (data / "other" / "inputs.json").write_text(json.dumps({"cases": [entry]}))
    assert results.earlier_masks(data / "other") == []
    (data / "other" / "masks").symlink_to(data / "masks")
    with pytest.raises(UserError, match="no folder"):
        results.earlier_masks(data / "other")


def test_cases_of_the_phantom_are_named_not_copied(tmp_path, monkeypatch):
    drawn = {name: (image, mask) for image, mask, name in phantom_images(2, PHANTOM_SEED)}
    monkeypatch.setattr("visattn.data.cases.embedded", lambda kind: drawn)  # the whole set takes seconds
    names = list(drawn)
    run = tmp_path / "run"
    metrics = SegmentationMetrics(BINARY, "full")
    task = task_of(BINARY, metrics)
    results.start_scoring(run, task)
    assert task.suite == "full"
    for name in names:
        truth = BINARY.encode(drawn[name][1], name)
        metrics.update(name, truth, truth, truth[None].astype(float), group=name)
        write_png(task.masks / f"{name}.png", BINARY.decode(truth))
    cases = [Case(name, Path(PHANTOM, name), Path(PHANTOM, name), name, PHANTOM) for name in names]
    finish(run, task, SimpleNamespace(cases={"val": cases}, description="phantom", fingerprint=""))
    for entry in read_scored(run).inputs.values():
        assert (entry.root, entry.image, entry.truth) == (PHANTOM, None, None)
        image, truth, predicted = load_case(entry, BINARY)
        assert image.shape == (144, 176, 3)
        assert np.array_equal(truth, predicted)
        assert cv2.countNonZero(predicted) > 0
