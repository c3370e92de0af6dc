"""`evaluate` gives the numbers of MONAI, of pysodmetrics and of `fit` for the same files."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import py_sod_metrics
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, MeanIoU, SurfaceDiceMetric
from monai.transforms import LoadImage, SaveImage

from visattn.cli import main
from visattn.metrics import SUITES

pytestmark = [
    pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the (prediction|ground truth) of class:UserWarning"),
]
EVERY = {"kvasir_seg": 10, "cvc_clinicdb": 4, "isic2017": 1, "chase_db1": 5, "dsb2018_nuclei": 3}
"""How many masks there are to one that is scored; distances in MONAI take their time."""


def disturbed(mask, generator):
    """A mask moved, eroded or dilated, sometimes emptied, sometimes with a stray blob."""
    height, width = mask.shape
    by = [int(generator.integers(-side // 25, side // 25 + 1)) for side in (width, height)]
    moved = cv2.warpAffine(mask, np.float32([[1, 0, by[0]], [0, 1, by[1]]]), (width, height), flags=cv2.INTER_NEAREST)
    steps = int(generator.integers(1, 4))
    change = (cv2.erode, cv2.dilate, lambda kept, *_, **__: kept)[generator.integers(3)]
    moved = change(moved, np.ones((3, 3), np.uint8), iterations=steps)
    if generator.random() < 0.3:
        moved[: height // 8, : width // 8] = mask.max()
    return moved * 0 if generator.random() < 0.1 else moved


def predict(truth: Path, folder: Path, every: int = 1) -> Path:
    """Write disturbed masks of some of the truth's, and copies of those; returns the folder of copies."""
    generator = np.random.default_rng(0)
    (folder / "pred").mkdir(parents=True)
    (folder / "gt").mkdir()
    for path in sorted(truth.iterdir())[::every]:
        mask = (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127).astype(np.uint8) * 255
        (folder / "gt" / path.name).write_bytes(path.read_bytes())
        name = path.stem.removesuffix("_segmentation")
        assert cv2.imwrite(str(folder / "pred" / f"{name}.png"), disturbed(mask, generator))
    return folder / "gt"


def evaluate(folder: Path, labels: str = "background: 0\npolyp: 255\n") -> dict[tuple[str, str], dict[str, str]]:
    (folder / "labels.yaml").write_text(labels)
    arguments = [
        "evaluate",
        folder / "pred",
        folder / "gt",
        "--labels",
        folder / "labels.yaml",
        "--output",
        folder / "o",
    ]
    assert main([str(word) for word in arguments]) == 0
    with (folder / "o" / "cases.csv").open(newline="") as handle:
        return {(row["case"], row["class"]): row for row in csv.DictReader(handle)}


def by_monai(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    pair = [torch.tensor(mask)[None, None].float() for mask in (predicted, truth)]
    metrics = {
        "dice": DiceMetric(include_background=True, reduction="none"),
        "iou": MeanIoU(include_background=True, reduction="none"),
        "hd95": HausdorffDistanceMetric(include_background=True, percentile=95, reduction="none"),
        "nsd": SurfaceDiceMetric([2.0], include_background=True, reduction="none"),
    }
    return {name: float(metric(*pair)) for name, metric in metrics.items()}


def by_pysodmetrics(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    handlers = {
        "dice": py_sod_metrics.DICEHandler,
        "iou": py_sod_metrics.IOUHandler,
        "precision": py_sod_metrics.PrecisionHandler,
        "recall": py_sod_metrics.RecallHandler,
        "specificity": py_sod_metrics.SpecificityHandler,
    }
    metric = py_sod_metrics.FmeasureV2(
        metric_handlers={name: kind(with_dynamic=True, with_adaptive=False) for name, kind in handlers.items()}
    )
    metric.step(predicted.astype(np.uint8) * 255, truth.astype(np.uint8) * 255)
    return {name: float(result["dynamic"][128]) for name, result in metric.get_results().items()}


def compare(rows, folder: Path) -> tuple[list[float], int]:
    """Check every row against both; returns MONAI's Dice of each, and how many had truth and prediction."""
    dice, both = [], 0
    for path in sorted((folder / "gt").iterdir()):
        name = path.stem.removesuffix("_segmentation")
        truth, predicted = (
            cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) > 127 for file in (path, folder / "pred" / f"{name}.png")
        )
        row = rows[name, "polyp"]
        if not truth.any():
            assert row["fpr_empty"] == str(int(predicted.any()))
            continue
        expected = by_monai(predicted, truth)
        dice.append(expected["dice"])
        if predicted.any():
            both += 1
            expected |= by_pysodmetrics(predicted, truth)
        else:  # both libraries leave distances undefined; we count the diagonal
            expected |= {"hd95": float(np.hypot(*truth.shape)), "nsd": 0.0}
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    return dice, both


def test_equal_to_monai_and_pysodmetrics_on_synthetic_masks(polyps, tmp_path):
    predict(polyps / "masks", tmp_path)
    assert compare(evaluate(tmp_path), tmp_path)[1] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_equal_to_monai_and_pysodmetrics_on_real_masks(real_data, tmp_path, name):
    predict(real_data / name / "masks", tmp_path, EVERY[name])
    dice, both = compare(evaluate(tmp_path), tmp_path)
    assert both >= len(dice) // 3
    means = json.loads((tmp_path / "o" / "summary.json").read_text())["means"]
    assert means["mean/dice"] == pytest.approx(np.mean(dice), abs=1e-6)


def test_several_classes_equal_monai_on_one_hot_masks(tmp_path):
    generator = np.random.default_rng(3)
    for side in ("pred", "gt"):
        (tmp_path / side).mkdir()
    for number in range(4):
        truth = np.zeros((37, 53), np.uint8)
        for value in (1, 2, 7):
            top, left = generator.integers(0, 20, 2)
            truth[top : top + 14, left : left + 17] = value
        predicted = np.roll(truth, generator.integers(-4, 5, 2), (0, 1))
        cv2.imwrite(str(tmp_path / "gt" / f"{number}.png"), truth)
        cv2.imwrite(str(tmp_path / "pred" / f"{number}.png"), predicted)
    rows = evaluate(tmp_path, "{background: 0, first: 1, second: [2], third: 7}")
    names = {"first": 1, "second": 2, "third": 7}
    checked = 0
    for number in range(4):
        truth, predicted = (cv2.imread(str(tmp_path / side / f"{number}.png"), -1) for side in ("gt", "pred"))
        for name, value in names.items():
            if (truth == value).any() and (predicted == value).any():
                expected = by_monai(predicted == value, truth == value)
                row = {key: float(rows[str(number), name][key]) for key in expected}
                assert row == pytest.approx(expected, rel=1e-5, abs=1e-6)
                checked += 1
    assert checked >= 8


@pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")  # what MONAI says where pydicom is installed
def test_masks_that_monai_saved_pair_and_score_as_they_are(polyps, tmp_path):
    (tmp_path / "gt").symlink_to(polyps / "masks")
    load = LoadImage(image_only=True, ensure_channel_first=True)
    save = SaveImage(output_dir=tmp_path / "pred", output_ext=".png", print_log=False)
    for path in sorted((polyps / "masks").iterdir()):
        save(torch.roll((load(path) > 127).float(), 2, dims=1))  # 0 and 1; the first axis is the width
    rows = evaluate(tmp_path, "background: 0\npolyp: [255, 1]")
    for path in (polyps / "masks").iterdir():
        truth = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) > 127
        if truth.any():
            expected = by_monai(np.roll(truth, 2, axis=1), truth)
            row = rows[path.stem, "polyp"]
            assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_the_masks_of_a_run_score_as_the_run_says(polyps, tmp_path):
    """`fit` scores in memory, `evaluate` what was written, and `predict` writes the same masks again."""
    run = tmp_path / "run"
    small = "--model.network.backbone resnet10t --data.size 64 --data.batch_size 4 --data.num_workers 0"
    small += " --data.split.val 0.34 --trainer.precision 32-true --trainer.accelerator cpu --trainer.max_epochs 3"
    assert main(["fit", "--config", "polyp_pranet", "--run", str(run), "--data.root", str(polyps), *small.split()]) == 0
    with (run / "cases.csv").open(newline="") as handle:
        fitted = {row["case"]: row for row in csv.DictReader(handle)}
    assert len(fitted) == 4
    (tmp_path / "gt").mkdir()
    for case in fitted:
        (tmp_path / "gt" / f"{case}.png").write_bytes((polyps / "masks" / f"{case}.png").read_bytes())
    (tmp_path / "pred").symlink_to(run / "masks")
    rows = evaluate(tmp_path)
    assert {case for case, _ in rows} == set(fitted)
    for (case, name), row in rows.items():
        for key in ("group", "class", *SUITES["surface"]):
            assert row[key] == fitted[case][key], (case, name, key)
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "o", run))
    assert ours["confusion"] == theirs["confusion"]
    assert ours["labels"] == theirs["labels"]
    assert set(ours["means"]) < set(theirs["means"])
    assert ours["means"] == pytest.approx({key: theirs["means"][key] for key in ours["means"]}, nan_ok=True)
    intervals = {(entry["name"], entry["metric"]): entry for entry in theirs["metrics"]}
    for entry in ours["metrics"]:
        assert entry == intervals[entry["name"], entry["metric"]]

    again = tmp_path / "predicted"
    images = str(polyps / "images")
    assert main(["predict", images, "--checkpoint", str(run), "--output", str(again), "--device", "cpu"]) == 0
    labels = str(tmp_path / "labels.yaml")
    assert main(["evaluate", str(again), str(polyps), "--labels", labels]) == 0
    with (again / "evaluation" / "cases.csv").open(newline="") as handle:
        found = {row["case"]: row for row in csv.DictReader(handle)}
    assert len(found) == 12
    for case, row in fitted.items():
        assert {key: found[case][key] for key in SUITES["surface"]} == {key: row[key] for key in SUITES["surface"]}
