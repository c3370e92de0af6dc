import json
import re

import numpy as np
import pytest

from visattn.cli import main
from visattn.data.geometry import Geometry
from visattn.data.nifti import read_labels, write
from visattn.errors import UserError
from visattn.evaluate import evaluate_folder, score_pair
from visattn.evaluate_plan import Pair, choose_cases, plan_pairs
from visattn.labels import Labels
from visattn.metrics import DETAILS, SUITES, case_metrics
from visattn.scored import Input, load_case, read_scored

LABELS = Labels.from_config({"background": 0, "tumour": 1})
COS, SIN = np.cos(0.2), np.sin(0.2)
AFFINE = np.eye(4)  # oblique, anisotropic, to the left
AFFINE[:3, :3] = [[COS, -SIN, 0], [SIN, COS, 0], [0, 0, 1]] @ np.array([[1, 0, 0], [0, COS, -SIN], [0, SIN, COS]])
AFFINE[:3, :3] *= [-0.9, 1.1, 3.0]
AFFINE[:3, 3] = 30, -20, 5
SHAPE = (20, 18, 9)


def lesion(*start, size=(6, 5, 3)):
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = 1
    return mask


def put(path, array, affine=AFFINE, kind="labels"):
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, array, Geometry(array.shape, affine), kind)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """gt/ and pred/ of four heads: shifted, right, healthy and found so, missed; images in img/ named as nnU-Net's."""
    monkeypatch.chdir(tmp_path)
    truths = [lesion(4, 4, 2), lesion(8, 8, 4), np.zeros(SHAPE, np.uint8), lesion(2, 2, 2)]
    found = [lesion(5, 4, 2), truths[1], truths[2], np.zeros(SHAPE, np.uint8)]
    for number, (truth, prediction) in enumerate(zip(truths, found, strict=True)):
        put(tmp_path / "gt" / f"head_{number}.nii.gz", truth)
        put(tmp_path / "pred" / f"head_{number}{'.nii' if number % 2 else '.nii.gz'}", prediction)
        image = np.random.default_rng(number).normal(size=SHAPE).astype(np.float32) + truth
        for channel in range(2):
            put(tmp_path / "img" / f"head_{number}_000{channel}.nii.gz", image * (1 - channel), kind="image")
    (tmp_path / "labels.yaml").write_text("background: 0\ntumour: 1\n")
    return tmp_path


def evaluate(*more, prediction="pred", truth="gt"):
    return main(["evaluate", prediction, truth, "--labels", "labels.yaml", *more])


def told(capsys):
    error = capsys.readouterr().err
    assert error.startswith("visattn: error: ")
    assert len(error.strip().splitlines()) <= 6
    return error


def test_volumes_are_scored_in_mm_and_ml(folders, capsys):
    assert evaluate("--images", "img") == 0
    scored = read_scored(folders / "pred" / "evaluation")
    geometry = Geometry(SHAPE, AFFINE)
    (expected,) = case_metrics(
        lesion(5, 4, 2), lesion(4, 4, 2), LABELS, suite="volume", spacing=geometry.zooms, voxel_ml=geometry.voxel_ml
    )
    row = scored.rows[0]
    assert list(row) == ["case", "group", "class", "split", *SUITES["volume"], *DETAILS]
    assert row["case"] == "head_0"
    assert row["split"] == ""
    assert {key: row[key] for key in expected} == {
        key: "" if value is None else f"{value:.6g}" for key, value in expected.items()
    }
    assert float(row["true_ml"]) == pytest.approx(90 * abs(np.linalg.det(AFFINE[:3, :3])) / 1000)
    assert float(row["hd95"]) == pytest.approx(geometry.zooms[0])
    assert float(scored.rows[3]["hd95"]) == pytest.approx(np.linalg.norm(np.array(SHAPE) * geometry.zooms))
    patients = scored.summary["detection"]["tumour"]["patients"]
    assert (patients["true"], patients["found"], patients["false"]) == (3, 2, 0)
    assert scored.summary["rules"]["lesions"] == {"iou": 0.1, "minimum_ml": 0.0, "large_ml": 3.0}
    assert scored.summary["confusion"]["counts"][0][0] == 4 * 20 * 18 * 9 - 4 * 90 + 75
    entry = scored.inputs["head_1", "head_1"]
    assert (entry.truth, entry.prediction) == (folders / "gt/head_1.nii.gz", folders / "pred/head_1.nii")
    assert entry.image == folders / "img/head_1_0000.nii.gz", "the first channel"
    assert len(list((folders / "pred/evaluation/overlays").iterdir())) == 3, "a healthy head has no Dice"
    out = capsys.readouterr().out
    assert "HD95 (mm)" in out
    assert "Volume error (ml)" in out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    assert lines["patients"] == ["3", "2", "0", "1.0000", "0.6667", "0.8000"]
    page = (folders / "pred/evaluation/report.html").read_text()
    assert "\u00a0mm" in page
    assert "\u00a0ml" in page
    assert "Found over all cases" in page


def test_rules_are_those_of_the_command_line(folders, capsys):
    assert evaluate("--lesion_iou", "0.9", "--minimum_ml", "0.1", "--tolerance", "0", "--patient_dice", "0.9") == 0
    scored = read_scored(folders / "pred" / "evaluation")
    assert (scored.rows[0]["lesion_f1"], scored.rows[1]["lesion_f1"]) == ("0", "1")
    assert float(scored.rows[0]["nsd"]) < 1
    assert scored.summary["detection"]["tumour"]["patients"]["found"] == 1
    assert "at least 0.9" in (folders / "pred/evaluation/report.html").read_text()
    capsys.readouterr()
    assert evaluate("--lesion_iou", "7") == 2
    assert "out of range" in told(capsys)


@pytest.mark.parametrize("layout", [("imagesTr", "labelsTr"), ("images", "labels")])
def test_a_data_set_as_published_brings_its_images(folders, layout):
    data = folders / "data"
    data.mkdir()
    (folders / "img").rename(data / layout[0])
    (folders / "gt").rename(data / layout[1])
    plan = plan_pairs(folders / "pred", data, None, folders / "out")
    assert [pair.name for pair in plan.pairs] == [f"head_{number}" for number in range(4)]
    assert [pair.image.name for pair in plan.pairs] == [f"head_{number}_0000.nii.gz" for number in range(4)]
    assert plan.volumes


def test_masks_of_predict_pair_without_its_maps(folders):
    out = folders / "out"
    for path in (folders / "pred").iterdir():
        stem = path.name.partition(".")[0]
        put(out / f"{stem}_mask.nii.gz", np.zeros(SHAPE, np.uint8))
        put(out / f"{stem}_prob.nii.gz", np.zeros(SHAPE, np.float32), kind="image")
        put(out / f"{stem}_uncertainty.nii.gz", np.zeros(SHAPE, np.float32), kind="image")
    (out / "manifest.json").write_text("{}")
    plan = plan_pairs(out, folders / "gt", None, folders / "evaluation")
    assert [pair.prediction.name for pair in plan.pairs] == [f"head_{number}_mask.nii.gz" for number in range(4)]
    assert not plan.extra


def test_names_that_end_in_four_digits_are_no_channels(folders):
    for side, kind in (("a", "labels"), ("b", "labels"), ("c", "image")):
        for number in (1, 7):
            put(folders / side / f"sub_{number:04d}.nii.gz", np.zeros(SHAPE, np.uint8), kind=kind)
    plan = plan_pairs(folders / "a", folders / "b", folders / "c", folders / "out")
    assert [pair.image.name for pair in plan.pairs] == ["sub_0001.nii.gz", "sub_0007.nii.gz"]


MOVED = AFFINE.copy()
MOVED[0, 3] += 2.5
TURNED = AFFINE @ np.diag([-1.0, 1, 1, 1])


@pytest.mark.parametrize(
    ("array", "affine", "message"),
    [
        (lesion(1, 1, 1), MOVED, "pred/head_0.nii.gz: lies up to 2.5 mm away from its true mask head_0.nii.gz"),
        (lesion(1, 1, 1), TURNED, r"\(axes RAS and LAS\)"),
        (lesion(1, 1, 1)[:-1], AFFINE, "19 x 18 x 9 voxels, but its true mask head_0.nii.gz has 20 x 18 x 9"),
        (lesion(1, 1, 1) * 7, AFFINE, "which labels does not name"),
    ],
)
def test_other_grids_and_values_are_refused(folders, capsys, array, affine, message):
    put(folders / "pred/head_0.nii.gz", array, affine)
    assert evaluate() == 2
    assert re.search(message, told(capsys))
    assert not (folders / "pred/evaluation").exists()


def test_noise_of_the_header_is_the_same_grid(folders):
    put(folders / "pred/head_0.nii.gz", lesion(5, 4, 2), AFFINE + np.float64(1e-6))
    assert evaluate() == 0


def test_headers_that_contradict_themselves_are_told(folders, capsys):
    sheared = AFFINE.copy()
    sheared[0, 1] += 0.3
    for side in ("pred", "gt"):
        (folders / side / "head_0.nii.gz").unlink()
        path = folders / side / "head_0.nii"
        put(path, lesion(4, 4, 2), sheared)
        header = bytearray(path.read_bytes())
        header[252] = 1  # qform_code: its rotation counts as well, which cannot hold the shear
        path.write_bytes(header)
    assert evaluate() == 0
    assert "cases with a file whose sform and qform differ: 1; the sform was used" in capsys.readouterr().err
    rows = read_scored(folders / "pred/evaluation").rows
    assert float(rows[0]["true_ml"]) == pytest.approx(90 * abs(np.linalg.det(sheared[:3, :3])) / 1000, rel=1e-5)


def test_an_image_elsewhere_is_refused(folders, capsys):
    put(folders / "img/head_0_0000.nii.gz", np.zeros(SHAPE, np.float32), MOVED, kind="image")
    assert evaluate("--images", "img") == 2
    assert "img/head_0_0000.nii.gz: lies up to 2.5 mm away" in told(capsys)


def test_damaged_volumes_are_named(folders, capsys):
    path = folders / "pred/head_0.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    assert evaluate() == 2
    assert "truncated" in told(capsys)


def test_truths_and_predictions_of_two_kinds_are_told(folders, capsys):
    (folders / "none").mkdir()
    assert evaluate(prediction="none") == 2
    assert "no volume in this folder" in told(capsys)


def test_cases_alone(folders, capsys):
    for number in (2, 3):
        (folders / f"pred/head_{number}{'.nii' if number % 2 else '.nii.gz'}").unlink()
    assert evaluate() == 2
    assert "--cases FILE scores some alone" in told(capsys)
    (folders / "names.txt").write_text("head_1\n\nhead_0\n")
    assert evaluate("--cases", "names.txt") == 0
    assert "true masks that --cases does not name, left out: 2" in capsys.readouterr().err
    table = folders / "pred/evaluation/cases.csv"
    kept = folders / "cases.csv"
    kept.write_bytes(table.read_bytes())
    assert evaluate("--cases", "cases.csv", "--output", "again") == 0
    assert (folders / "again/cases.csv").read_bytes() == kept.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("head_0\nhead_9\n", "1 of its cases have no true mask: head_9"),
        ("", "names no case"),
        ("case,class\n", "names no case"),
        ("\xff\x00", "no text"),
    ],
)
def test_names_that_choose_nothing_are_told(folders, capsys, content, message):
    (folders / "names.txt").write_bytes(content.encode("latin-1"))
    assert evaluate("--cases", "names.txt") == 2
    assert message in told(capsys)


def test_a_case_may_be_named_by_its_last_part(folders):
    for group in ("a", "b"):
        for number in range(2):
            put(folders / "deep" / group / f"{group}{number}.nii.gz", lesion(1, 1, 1))
            put(folders / "deep" / group / "same.nii.gz", lesion(1, 1, 1))
    plan = plan_pairs(folders / "deep", folders / "deep", None, folders / "out")
    (folders / "names.txt").write_text("a1\nb/same\n")
    assert [pair.name for pair in choose_cases(plan, folders / "names.txt").pairs] == ["a/a1", "b/same"]
    (folders / "names.txt").write_text("same\n")
    with pytest.raises(UserError, match=r"may be a/same, b/same"):
        choose_cases(plan, folders / "names.txt")


def test_options_of_volumes_are_refused_for_images(folders, capsys):
    import cv2

    (folders / "flat").mkdir()
    cv2.imwrite("flat/a.png", np.zeros((8, 8), np.uint8))
    assert evaluate("--minimum_ml", "1", prediction="flat", truth="flat") == 2
    assert "are for volumes" in told(capsys)


def test_a_scored_case_is_shown_by_three_planes(folders):
    paths = [folders / name for name in ("img/head_0_0000.nii.gz", "gt/head_0.nii.gz", "pred/head_0.nii.gz")]
    image, truth, prediction = load_case(Input("head_0", "", "gt", *paths), LABELS)
    assert image.shape == (*truth.shape, 3) == (*prediction.shape, 3)
    assert image.shape[1] > 2 * image.shape[0], "side by side"
    assert 0 < (truth != prediction).sum() < truth.sum()
    put(paths[2], lesion(1, 1, 1), MOVED)
    with pytest.raises(UserError, match="away from its true mask"):
        load_case(Input("head_0", "", "gt", *paths), LABELS)


def test_a_phantom_head_is_drawn_again():
    image, truth, prediction = load_case(Input("head_001", "", "phantom", None, None, None), LABELS)
    assert image.std() > 10
    assert truth.any()
    assert prediction is None


def test_evaluations_of_volumes_are_compared(folders, capsys):
    evaluate_folder("pred", "gt", "labels.yaml", output="one", images="img")
    put(folders / "pred/head_3.nii", lesion(2, 2, 2))
    evaluate_folder("pred", "gt", "labels.yaml", output="two")
    capsys.readouterr()
    assert main(["compare", "one", "two", "--output", "compared"]) == 0
    out = capsys.readouterr().out
    assert "volume_error (ml)" in out
    assert "hd95 (mm)" in out
    assert "0/3/0" in out or "1/2/0" in out
    content = json.loads((folders / "compared/compare.json").read_text())
    assert {entry["metric"] for entry in content["differences"]} == set(SUITES["volume"])
    page = (folders / "compared/report.html").read_text()
    assert page.count("data:image/jpeg") == 2, "the missed case, as both see it"
    assert "No pictures" not in page


def test_masks_of_one_grid_and_of_another_are_not_the_same_truth(folders, capsys):
    evaluate_folder("pred", "gt", "labels.yaml", output="one")
    for folder in ("gt", "pred"):
        for path in (folders / folder).iterdir():
            array, _ = read_labels(path)
            put(folders / f"other_{folder}" / path.name, array, MOVED)
    evaluate_folder("other_pred", "other_gt", "labels.yaml", output="two")
    capsys.readouterr()
    assert main(["compare", "one", "two"]) == 2
    assert "true masks of 'head_0' differ" in told(capsys)


def test_one_case_is_scored_as_by_hand(folders):
    pair = Pair("head_0", folders / "gt/head_0.nii.gz", None, None)
    scored = score_pair(pair, LABELS)
    assert scored.rows[0]["dice"] == 0
    assert scored.rows[0]["volume_error"] == scored.rows[0]["true_ml"]
    assert scored.confusion.sum() == 20 * 18 * 9


def test_hippocampus_as_published(real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    labels = tmp_path / "labels.yaml"
    labels.write_text("background: 0\nanterior: 1\nposterior: 2\n")
    names = sorted(path.name for path in (real_data / "hippocampus/labelsTr").glob("*.nii.gz"))[:3]
    for name in names:
        array, geometry = read_labels(real_data / "hippocampus/labelsTr" / name)
        (tmp_path / "pred").mkdir(exist_ok=True)
        write(tmp_path / "pred" / name, array, geometry, "labels")
    (tmp_path / "names").write_text("\n".join(name.partition(".")[0] for name in names))
    assert evaluate_folder("pred", real_data / "hippocampus", labels, cases="names") == 0
    scored = read_scored("pred/evaluation")
    assert scored.summary["means"]["mean/dice"] == 1
    assert all(1 < float(row["true_ml"]) < 4 for row in scored.rows)
    assert all(entry.image is not None for entry in scored.inputs.values())
