import csv
import os
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from predict_fakes import blocks, manifest, mask, rows, save_image, tree

from visattn.cells import cell, text_of
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.predict import predict_folder
from visattn.predict_plan import Case, find_images, fitted_name, plan_cases, shown


def test_a_bad_image_fails_alone(tmp_path, checkpoint, capsys):
    good = save_image(tmp_path / "in" / "b.png", seed=3)
    save_image(tmp_path / "in" / "c.jpg", size=(64, 64))
    data = (tmp_path / "in" / "c.jpg").read_bytes()
    (tmp_path / "in" / "c.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "in" / "a.png").write_bytes(b"")
    out = tmp_path / "out"
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 1
    assert tree(out) == ["b.png", "manifest.json", "predictions.csv"]
    np.testing.assert_array_equal(mask(out / "b.png"), good)
    text = capsys.readouterr().err
    assert "a.png" in text
    assert "c.jpg" in text
    assert "1 predicted, 2 failed" in text
    assert str(out) in text.splitlines()[-1]
    assert [c["state"] for c in manifest(out)["cases"]] == ["failed", "done", "failed"]
    assert [r["case"] for r in rows(out)] == ["b"]

    (tmp_path / "in" / "c.jpg").write_bytes(data)  # repaired: only this one is done
    (tmp_path / "in" / "a.png").unlink()
    before = (out / "b.png").stat().st_mtime_ns
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 0
    assert (out / "b.png").stat().st_mtime_ns == before
    assert [c["state"] for c in manifest(out)["cases"]] == ["done", "done"]


def test_an_older_mask_does_not_pass_for_a_failed_case(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", probabilities=True)
    (tmp_path / "a.png").write_bytes(b"broken")
    assert predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out") == 1
    assert tree(tmp_path / "out") == ["manifest.json", "predictions.csv"]
    assert rows(tmp_path / "out") == []


def test_inputs_that_are_not_there(tmp_path, checkpoint):
    save_image(tmp_path / "image.png")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"imagee\.png: no such file or folder\.\nDid you mean .*image\.png"):
        predict_folder([tmp_path / "imagee.png"], checkpoint, out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no image in this folder\.\nImages end in: \.png"):
        predict_folder([tmp_path / "empty"], checkpoint, out)
    with pytest.raises(UserError, match="no such checkpoint"):
        predict_folder([tmp_path / "image.png"], tmp_path / "x.ckpt", out)
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        predict_folder([tmp_path / "image.png"], checkpoint, out, device="cudda")
    with pytest.raises(UserError, match="between 0 and 1"):
        predict_folder([tmp_path / "image.png"], checkpoint, out, threshold=50)
    with pytest.raises(UserError, match="unknown tta"):
        predict_folder([tmp_path / "image.png"], checkpoint, out, tta="all")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="not on this machine"):
            predict_folder([tmp_path / "image.png"], checkpoint, out, device="cuda")
    assert not out.exists(), "a mistake leaves no folder behind"


def test_two_inputs_with_one_mask(tmp_path, checkpoint):
    save_image(tmp_path / "in" / "a.jpg")
    save_image(tmp_path / "in" / "a.png")
    with pytest.raises(UserError) as error:
        predict_folder([tmp_path / "in"], checkpoint, tmp_path / "out")
    message = str(error.value)
    assert all(str(tmp_path / name) in message for name in ("out/a.png", "in/a.jpg", "in/a.png"))
    assert len(message.splitlines()) <= 6
    assert not (tmp_path / "out").exists()
    save_image(tmp_path / "one" / "b.png")
    save_image(tmp_path / "two" / "b.png")
    with pytest.raises(UserError, match="same file"):
        predict_folder([tmp_path / "one", tmp_path / "two"], checkpoint, tmp_path / "out")
    # the advice works
    (tmp_path / "both").mkdir()
    for name in ("one", "two"):
        (tmp_path / name).rename(tmp_path / "both" / name)
    assert predict_folder([tmp_path / "both"], checkpoint, tmp_path / "out") == 0
    assert (tmp_path / "out" / "two" / "b.png").exists()


def plan(names, labels=None, probabilities=False, overlays=False, case_sensitive=True, output=Path("/out")):
    images = [(Path("/in") / name, PurePosixPath(name)) for name in names]
    labels = labels or Labels.from_config({"background": 0, "polyp": 1})
    return plan_cases(images, output, labels, probabilities, overlays, case_sensitive)


def test_less_obvious_collisions():
    with pytest.raises(UserError, match="same file"):
        plan(["overlays/a.png", "a.png"], overlays=True)
    with pytest.raises(UserError, match="same file"):
        plan(["probabilities/a_prob.png", "a.png"], probabilities=True)
    with pytest.raises(UserError, match="same file"):
        plan(["a.jpg", "a.png/b.jpg"])  # a mask and a folder of one name
    plan(["A.png", "a.jpg", "e\u0301.png", "\u00e9.png"])
    for pair in (["A.png", "a.jpg"], ["e\u0301.png", "\u00e9.png"]):
        with pytest.raises(UserError, match="same file"):
            plan(pair, case_sensitive=False)
    labels = Labels.from_config({"bg": 0, "a/b": 1, "a:b": 2, "A b": 3, "../..": 4})
    (case,) = plan(["x.png"], labels, probabilities=True)
    assert len({name.casefold() for name in case.probabilities}) == 5
    assert {Path(name).parent for name in case.probabilities} == {Path("probabilities")}


def test_an_input_is_never_overwritten(tmp_path, checkpoint):
    save_image(tmp_path / "in" / "a.png")
    before = (tmp_path / "in" / "a.png").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is an input folder too"):
            predict_folder([tmp_path / "in"], checkpoint, tmp_path / "in", overwrite=overwrite)
        with pytest.raises(UserError, match="is an input image and would be overwritten"):
            predict_folder([tmp_path / "in" / "a.png"], checkpoint, tmp_path / "in", overwrite=overwrite)
        (tmp_path / "link").symlink_to(tmp_path / "in") if not overwrite else None
        with pytest.raises(UserError, match="would be overwritten"):
            predict_folder([tmp_path / "in" / "a.png"], checkpoint, tmp_path / "link", overwrite=overwrite)
    assert (tmp_path / "in" / "a.png").read_bytes() == before
    assert tree(tmp_path / "in") == ["a.png"]


def test_output_inside_the_input_is_not_read_again(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    out = tmp_path / "masks"
    for _ in range(2):
        assert predict_folder([tmp_path], checkpoint, out) == 0
        assert tree(out) == ["a.png", "manifest.json", "predictions.csv"]


def test_linked_folders_are_searched_once(tmp_path):
    save_image(tmp_path / "elsewhere" / "b.png")
    save_image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    found = find_images([tmp_path / "in", tmp_path / "in" / "a.png"], tmp_path / "out")
    assert [str(relative) for _, relative in found] == ["a.png", "linked/b.png"]


HOSTILE = [
    "=cmd|' calc'!A0.png",
    "-2+3.png",
    "@sum.png",
    "+1.png",
    '<script>alert("1")<script>.png',
    "new\nline.png",
    "tab\there.png",
    "\x1b[31mred.png",
    "[bold]rich[bold].png",
    "名前 — ü.png",
    "\u202egnp.png",
    "quote\"'.png",
    "%s{0}$HOME.png",
    "long" * 62 + ".jpeg",
]


def test_hostile_names(tmp_path, checkpoint, capsys):
    raw = os.fsdecode(b"not-utf8-\xff.png")
    for index, name in enumerate([*HOSTILE, raw]):
        save_image(tmp_path / "in" / "x.png", seed=index)
        (tmp_path / "in" / "x.png").rename(tmp_path / "in" / name)
    (tmp_path / "in" / "\x1b]0;bad\n.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict_folder([tmp_path / "in"], checkpoint, out, overlays=True, probabilities=True) == 1
    for index, name in enumerate(HOSTILE):
        if not name.startswith("long"):
            np.testing.assert_array_equal(mask(out / (name.rsplit(".", 1)[0] + ".png")), blocks(index))
    assert all(len(os.fsencode(p.name)) <= 255 for p in out.rglob("*"))
    text = (out / "predictions.csv").read_bytes().decode("utf-8")
    content = list(csv.DictReader(text.splitlines(keepends=True)))
    assert len(content) == len(HOSTILE) + 1
    for row in content:
        for value in row.values():
            assert not value or value[0] not in "=+-@\t\r"
    assert any(row["case"] == "'=cmd|' calc'!A0" for row in content)
    assert raw in {Path(entry["image"]).name for entry in manifest(out)["cases"]}
    told = capsys.readouterr().err
    assert "\x1b" not in told
    assert "x1b]0;bad" in told
    assert predict_folder([tmp_path / "in"], checkpoint, out, overlays=True, probabilities=True) == 1
    assert f"{len(HOSTILE) + 1} unchanged" in capsys.readouterr().err


def test_small_helpers():
    assert cell("=1") == "'=1"
    assert cell(-1.5) == -1.5
    assert cell(None) == ""
    assert cell("a=1") == "a=1"
    for text in ("=1", "'=1", "''@", "'", "a", ""):
        assert text_of(str(cell(text))) == text
    assert shown("a\nb\x1b\u202e\udcff é") == r"a\nb\x1b\u202e\udcff é"
    assert fitted_name("a", ".png") == "a.png"
    one, two = fitted_name("é" * 200 + "1", "_prob.png"), fitted_name("é" * 200 + "2", "_prob.png")
    assert one != two
    assert len(one.encode()) <= 255
    assert Case(Path("a"), "m.png", ("p.png",), "o.png").files == ("p.png", "o.png", "m.png")
