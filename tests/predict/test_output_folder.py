import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from predict_fakes import create_model, manifest, mask, rows, save_image, tree, write_checkpoint

import visattn
import visattn.networks
from visattn import predict as module
from visattn.errors import UserError
from visattn.predict import predict_folder
from visattn.predict_plan import output_folder
from visattn.predict_record import file_hash


def test_files_of_others_are_not_overwritten(tmp_path, checkpoint):
    array = save_image(tmp_path / "in" / "a.png", seed=1)
    out = tmp_path / "truth"
    out.mkdir()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(out / "a.png")
    before = (out / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"not written by visattn predict(.|\n)*truth/a\.png(.|\n)*--overwrite"):
        predict_folder([tmp_path / "in"], checkpoint, out)
    assert tree(out) == ["a.png"]
    assert (out / "a.png").read_bytes() == before
    assert predict_folder([tmp_path / "in"], checkpoint, out, overwrite=True) == 0
    np.testing.assert_array_equal(mask(out / "a.png"), array)

    Image.fromarray(array[::-1]).save(out / "a.png")  # corrected by hand
    by_hand = (out / "a.png").read_bytes()
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 0, "unchanged input: left alone"
    with pytest.raises(UserError, match="changed since"):
        predict_folder([tmp_path / "in"], checkpoint, out, tta="flips")
    assert (out / "a.png").read_bytes() == by_hand
    (out / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="not a manifest"):
        predict_folder([tmp_path / "in"], checkpoint, out)


@pytest.mark.parametrize("change", ["case", "list", "type", "size", "text", "deep"])
def test_a_damaged_manifest_is_told(tmp_path, checkpoint, change):
    save_image(tmp_path / "a.png")
    out = tmp_path / "out"
    predict_folder([tmp_path / "a.png"], checkpoint, out)
    content = manifest(out)
    if change == "case":
        content["cases"][0]["extra"] = 1
    elif change == "list":
        content["cases"] = 3
    elif change == "type":
        content["cases"][0]["files"] = "a.png"
    elif change == "size":
        content["cases"][0]["size"] = [1]
    text = {"text": "{", "deep": "[" * 100_000}.get(change) or json.dumps(content)
    (out / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="not a manifest"):
        predict_folder([tmp_path / "a.png"], checkpoint, out)
    assert predict_folder([tmp_path / "a.png"], checkpoint, out, overwrite=True) == 0


def test_a_manifest_cannot_point_outside(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    out = tmp_path / "out"
    predict_folder([tmp_path / "a.png"], checkpoint, out)
    victim = tmp_path / "victim.txt"
    victim.write_text("keep")
    content = manifest(out)
    content["cases"][0]["files"]["../victim.txt"] = file_hash(victim)
    (out / "manifest.json").write_text(json.dumps(content))
    predict_folder([tmp_path / "a.png"], checkpoint, out, tta="flips")
    assert victim.read_text() == "keep"


def test_only_what_changed_is_done_again(tmp_path, checkpoint, monkeypatch):
    done = []
    decode = module._Run._decode
    monkeypatch.setattr(module._Run, "_decode", lambda self, case: done.append(case.name) or decode(self, case))
    out, folder = tmp_path / "out", tmp_path / "in"
    for name in "abc":
        save_image(folder / f"{name}.png", seed=ord(name))

    def run(**options):
        done.clear()
        assert predict_folder([folder], options.pop("checkpoint", checkpoint), out, **options) == 0
        return sorted(done)

    assert run() == ["a", "b", "c"]
    assert run() == []
    save_image(folder / "b.png", seed=99)
    assert run() == ["b"]
    (out / "c.png").unlink()
    assert run() == ["c"]
    os.utime(folder / "a.png")
    assert run() == [], "times do not count, content does"
    assert run(threshold=0.4) == ["a", "b", "c"]
    assert run() == ["a", "b", "c"], "the masks there are those of the other threshold"
    assert run(overlays=True) == ["a", "b", "c"]
    assert run() == []
    assert run(overwrite=True) == ["a", "b", "c"]
    assert not (out / "overlays" / "a.png").exists(), "an overlay that was not made anew is gone"
    assert run(tta="flips") == ["a", "b", "c"]
    other = write_checkpoint(tmp_path / "other.ckpt", shift=0.5)
    assert run(checkpoint=other) == ["a", "b", "c"]
    assert run(checkpoint=other) == []
    moved = tmp_path / "moved.ckpt"
    other.rename(moved)
    assert run(checkpoint=moved) == [], "weights count, their file's name does not"


def test_masks_of_other_settings_stay_out_of_the_table(tmp_path, checkpoint, capsys):
    for name in "ab":
        save_image(tmp_path / f"{name}.png")
    out = tmp_path / "out"
    predict_folder([tmp_path / "a.png"], checkpoint, out)
    predict_folder([tmp_path / "b.png"], checkpoint, out)
    assert [r["case"] for r in rows(out)] == ["a", "b"], "one folder may be filled by several calls"
    predict_folder([tmp_path / "b.png"], checkpoint, out, threshold=0.3)
    assert [r["case"] for r in rows(out)] == ["b"]
    assert "1 masks of other weights or settings" in capsys.readouterr().err
    (out / "a.png").unlink()
    predict_folder([tmp_path / "b.png"], checkpoint, out, threshold=0.3)
    assert [c["mask"] for c in manifest(out)["cases"]] == ["b.png"]


def test_output_that_cannot_be_written(tmp_path, checkpoint, monkeypatch):
    save_image(tmp_path / "a.png")
    (tmp_path / "file").write_text("")

    def no_network(*args):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(module, "Predictor", no_network)
    with pytest.raises(UserError, match="is a file"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "file" / "out")
    with pytest.raises(UserError, match="cannot be written"):
        predict_folder([tmp_path / "a.png"], checkpoint, Path("/proc/out"))
    monkeypatch.setattr("visattn.predict_plan.shutil.disk_usage", lambda _: os.statvfs_result and Usage(10))
    with pytest.raises(UserError, match=r"needs about .* MB, but 0 MB are free"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out", probabilities=True)
    assert not (tmp_path / "out").exists()


class Usage:
    def __init__(self, free):
        self.free = free


def test_one_run_at_a_time(tmp_path, checkpoint):
    save_image(tmp_path / "a.png")
    with output_folder(tmp_path / "out"), pytest.raises(UserError, match="another visattn predict"):
        predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out")
    assert predict_folder([tmp_path / "a.png"], checkpoint, tmp_path / "out") == 0


def test_disk_full_keeps_what_is_done(tmp_path, checkpoint, monkeypatch):
    arrays = {name: save_image(tmp_path / "in" / f"{name}.png", seed=ord(name)) for name in "abcdef"}
    out = tmp_path / "out"
    write = module.write_bytes_atomic

    def full(path, data):
        if path.name == "d.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(module, "write_bytes_atomic", full)
    with pytest.raises(UserError, match="No space left on device"):
        predict_folder([tmp_path / "in"], checkpoint, out)
    states = {c["mask"]: c["state"] for c in manifest(out)["cases"]}
    assert states["a.png"] == states["c.png"] == "done"
    assert states["d.png"] == "planned"
    monkeypatch.undo()
    monkeypatch.setattr(visattn.networks, "create_model", create_model, raising=False)
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 0
    for name, array in arrays.items():
        np.testing.assert_array_equal(mask(out / f"{name}.png"), array)
    assert [r["case"] for r in rows(out)] == list("abcdef")


def test_a_case_that_cannot_be_written_fails_alone(tmp_path, checkpoint):
    save_image(tmp_path / "in" / "a.png")
    save_image(tmp_path / "in" / "sub" / "b.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "sub").write_text("a file where a folder should be")
    assert predict_folder([tmp_path / "in"], checkpoint, out) == 1
    assert [r["case"] for r in rows(out)] == ["a"]


def test_interruption_keeps_what_is_done(tmp_path, checkpoint, monkeypatch, capsys):
    for name in "abcdefgh":
        save_image(tmp_path / "in" / f"{name}.png")
    collect = module._Run._collect
    calls = []

    def interrupted(self, limit):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        collect(self, limit)

    monkeypatch.setattr(module._Run, "_collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_folder([tmp_path / "in"], checkpoint, tmp_path / "out")
    assert "same command goes on" in capsys.readouterr().err
    done = [c for c in manifest(tmp_path / "out")["cases"] if c["state"] == "done"]
    assert len(done) >= 1
    for entry in done:
        assert (tmp_path / "out" / entry["mask"]).exists()
    assert not [p for p in (tmp_path / "out").iterdir() if ".part" in p.name or "lock" in p.name]
