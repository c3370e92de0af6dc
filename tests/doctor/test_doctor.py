"""The command: exit codes, JSON, parts as training makes them, the table of groups, hostile input."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visattn.cli import main
from visattn.data.phantom import write_phantom
from visattn.doctor import examine_folder, examine_recipe
from visattn.doctor.codes import KINDS, SEVERITIES
from visattn.doctor.files import refusal
from visattn.doctor.recipe import KEYS

DOCS = Path(__file__).resolve().parents[2] / "docs"
REAL = ("kvasir_seg", "cvc_clinicdb", "isic2017", "dsb2018_nuclei", "chase_db1")


@pytest.mark.parametrize(("spoil", "code"), [(None, 0), ("missing", 1), ("warning", 0)])
def test_exit_codes(clean, defects, capsys, spoil, code):
    if spoil == "missing":
        (clean / defects.MASK).unlink()
    if spoil == "warning":
        defects.same_image_mirrored(clean)
    assert main(["doctor", str(clean)]) == code
    out = capsys.readouterr().out
    assert ("error   missing-mask  1 file" in out) == (spoil == "missing")
    assert ("warning mirrored-image  1 file" in out) == (spoil == "warning")
    assert f"- {defects.IMAGE} = phantom_0006.png" in out or spoil != "warning"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["doctor"], "give a folder, or a recipe"),
        (["doctor", "nowhere"], "no such folder"),
        (["doctor", "SET", "--config", "polyp_pranet"], "unexpected argument 'SET'"),
        (["doctor", "SET", "--data.size", "64"], "needs --config RECIPE"),
        (["doctor", "SET", "SET"], "unexpected argument"),
        (["doctor", "SET", "--jsn"], "Did you mean --json?"),
        (["doctor", "--config", "polyp_prant"], "Did you mean 'polyp_pranet'?"),
        (["doctor", "--config", "polyp_pranet", "--data.rot", "SET"], "Did you mean 'root'?"),
        (["doctor", "--config", "polyp_pranet", "--data.root", "nowhere"], "there is no folder nowhere"),
        (["doctor", "--config", "polyp_pranet", "--data.size", "big"], "data.size"),
        (["doctor", "--config", "polyp_pranet", "--data.labels", "3"], "labels"),
    ],
)
def test_misuse(words, told, clean, capsys, monkeypatch):
    monkeypatch.chdir(clean.parent)
    assert main([word.replace("SET", clean.name) for word in words]) == 2
    error = capsys.readouterr().err
    assert told.replace("SET", clean.name) in error
    assert len(error.splitlines()) <= 6


@pytest.mark.parametrize("name", ["imagesTr/a_001.nii.gz", "scan.nii", "patient/t1.nrrd", "set.npz"])
def test_volumes_without_labels_or_in_other_formats(tmp_path, capsys, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    assert main(["doctor", str(tmp_path)]) == 2
    assert ("no known layout" if ".nii" in name else "holds volumes in a format") in capsys.readouterr().err


def test_json(clean, defects, capsys):
    (clean / defects.MASK).unlink()
    assert main(["doctor", str(clean), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["format", "data", "cases", "labels", "labels_guessed", "classes", "counts", "findings"]
    assert report["format"] == 1
    assert report["cases"] == 15
    assert report["labels"] == {"background": 0, "foreground": 255}
    assert report["counts"]["error"] == 1
    assert sum(report["counts"].values()) == len(report["findings"])
    severities = [finding["severity"] for finding in report["findings"]]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert report["findings"][0] == {
        "severity": "error",
        "code": "missing-mask",
        "message": "image without a mask of the same name",
        "count": 1,
        "files": [{"path": defects.IMAGE, "note": ""}],
        "fix": KINDS["missing-mask"].fix,
    }


def test_the_keys_of_a_recipe_are_those_of_the_data_module():
    from visattn.data.image_mask_folder import ImageMaskFolder

    parameters = inspect.signature(ImageMaskFolder).parameters
    assert {name: None if p.default is p.empty else p.default for name, p in parameters.items()} == KEYS


@pytest.mark.parametrize("split", [{"val": 0.3, "test": 0.2}, {"folds": 3, "fold": 1}, {"group_by": "^phantom_..(.)"}])
def test_the_parts_are_those_of_training(clean, defects, split):
    """A copy planted into the part that training validates on is told with that part's name."""
    from visattn.data.image_mask_folder import ImageMaskFolder

    Image.fromarray(np.asarray(Image.open(clean / defects.MASK)) * 0).save(clean / defects.MASK)
    labels = {"background": 0, "polyp": 255}
    data = ImageMaskFolder(str(clean), labels, size=64, split=split, seed=7)
    data.setup("fit")
    part = {case.name: name for name, cases in data.cases.items() for case in cases}
    for other in ("phantom_0001", "phantom_0004", "phantom_0012"):
        defects.save(clean / f"images/{other}.png", defects.array(clean / defects.IMAGE), compress_level=1)
    changes = ["--data.root", str(clean), "--data.split", json.dumps(split), "--seed_everything", "7"]
    report = examine_recipe(["polyp_pranet"], changes)
    counts = {name: len(cases) for name, cases in data.cases.items()}
    (parts,) = [finding for finding in report.findings if finding.code == "parts"]
    assert parts.details[0].startswith(", ".join(f"{name} {number}" for name, number in counts.items()))
    (copy,) = [f for f in report.findings if f.code in ("duplicate-image", "duplicate-across-parts")]
    torn = len({part[name] for name in ("phantom_0001", "phantom_0004", "phantom_0012")}) > 1
    assert copy.code == ("duplicate-across-parts" if torn else "duplicate-image")
    (place,) = copy.places
    assert place.path == "images/phantom_0001.png"
    assert place.note == f"({part['phantom_0001']}) = " + ", ".join(
        f"{name}.png ({part[name]})" for name in ("phantom_0004", "phantom_0012")
    )


def test_folders_called_train_val_and_test_are_parts(clean, defects, tmp_path):
    root = tmp_path / "parts"
    for part, seed in (("train", 1), ("val", 2), ("test", 3)):
        write_phantom(root / part, 6, seed=seed, size=(64, 80))
    shutil.copy(root / "train/images/phantom_0002.png", root / "test/images/phantom_0004.png")
    Image.open(root / "train/images/phantom_0003.png").save(root / "val/images/phantom_0001.png", compress_level=1)
    report = examine_folder(root)
    found = {finding.code: finding for finding in report.findings if finding.severity != "info"}
    assert found["duplicate-across-parts"].places[0].path == "train/images/phantom_0002.png"
    assert found["duplicate-across-parts"].places[0].note == "(train) = phantom_0004.png (test)"
    same = [finding.places[0].path for code, finding in found.items() if code.endswith("duplicate-across-parts")]
    assert "train/images/phantom_0003.png" in same or "near-duplicate-across-parts" in found


def test_copies_between_training_and_the_test_root(clean, defects, tmp_path):
    other = Path(shutil.copytree(clean, tmp_path / "held_out"))
    report = examine_recipe(["polyp_pranet"], ["--data.root", str(clean), "--data.test_root", str(other)])
    (finding,) = [finding for finding in report.findings if finding.code == "duplicate-across-parts"]
    assert finding.count == 16
    assert "(test)" in finding.places[0].note


def test_the_table_of_groups_keeps_videos_and_copies_together(clean, defects, tmp_path, capsys):
    defects.film(clean)
    shutil.copy(clean / "images/3.png", clean / "images/x.png")
    shutil.copy(clean / "masks/3.png", clean / "masks/x.png")
    table = tmp_path / "groups.csv"
    assert main(["doctor", str(clean), "--groups", str(table)]) == 0
    assert "2 groups" in capsys.readouterr().err
    rows = dict(line.split(",") for line in table.read_text().splitlines()[1:])
    assert {rows[str(i)] for i in range(1, 13)} == {"1"} == {rows["x"]}
    assert {rows[str(i)] for i in range(13, 25)} == {"13"}
    keys = ["--data.root", str(clean), "--data.split.val", "0.4", "--data.split.group_by", f"{table}:group"]
    codes = examine_recipe(["polyp_pranet"], keys).codes()
    assert not {"video-across-parts", "video-frames", "duplicate-image", "duplicate-across-parts"} & set(codes)


def test_a_table_of_groups_that_cannot_be_written(clean, defects, capsys):
    assert main(["doctor", str(clean), "--groups", str(clean / defects.IMAGE / "groups.csv")]) == 2
    assert "--groups" in capsys.readouterr().err


def test_a_folder_called_phantom_is_a_folder(clean, defects, monkeypatch, capsys):
    (clean / defects.MASK).unlink()
    clean.rename(clean.parent / "phantom")
    monkeypatch.chdir(clean.parent)
    assert main(["doctor", "phantom"]) == 1
    out = capsys.readouterr().out
    assert f"- {defects.IMAGE}\n" in out
    assert "phantom: 15 cases, 1 error, 0 warnings" in out


def test_a_folder_without_permission(clean, monkeypatch, capsys):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert main(["doctor", str(clean)]) == 2
    assert "permission denied" in capsys.readouterr().err


def test_images_of_one_name_share_a_group(tmp_path, capsys):
    for part, seed in (("a", 1), ("b", 2)):
        write_phantom(tmp_path / "set" / part, 3, seed=seed, size=(64, 80))
    shutil.copy(tmp_path / "set/a/images/phantom_0002.png", tmp_path / "set/b/images/phantom_0001.png")
    table = tmp_path / "groups.csv"
    assert main(["doctor", str(tmp_path / "set"), "--groups", str(table)]) == 0
    assert "2 groups" in capsys.readouterr().err
    rows = dict(line.split(",") for line in table.read_text().splitlines()[1:])
    assert rows == {"phantom_0000": "phantom_0000", "phantom_0001": "phantom_0001", "phantom_0002": "phantom_0001"}


def test_a_file_name_does_not_write_to_the_terminal(clean, defects, capsys):
    (clean / defects.MASK).rename(clean / "masks/\x1b[31mred\x1b]0;title\x07.png")
    assert main(["doctor", str(clean)]) == 1
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert "\\x1b[31mred" in captured.out


def test_a_name_with_markup_is_printed_as_it_is(clean, defects, capsys):
    (clean / defects.MASK).rename(clean / "masks/[bold]x[red].png")
    assert main(["doctor", str(clean)]) == 1
    assert "masks/[bold]x[red].png" in capsys.readouterr().out


def test_any_damage_is_a_finding_and_no_traceback(clean, defects):
    """Random bytes of files of every format are changed, cut off or doubled."""
    rng = np.random.default_rng(3)
    formats = [("png", {}), ("jpg", {"quality": 80}), ("bmp", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})]
    for index, path in enumerate(sorted((clean / "images").iterdir())):
        suffix, options = formats[index % len(formats)]
        defects.oriented(path.with_suffix(f".{suffix}"), defects.array(path), 1 + index % 8, **(options | {}))
        if suffix != "png":
            path.unlink()
    good = {path: path.read_bytes() for path in (clean / "images").iterdir()}
    for _ in range(6):
        for path, data in good.items():
            spoilt = bytearray(data)
            for place in rng.integers(0, len(spoilt), rng.integers(1, 12)):
                spoilt[min(place, len(spoilt) - 1) if rng.random() < 0.5 else place % 200] = rng.integers(256)
            path.write_bytes(spoilt if rng.random() < 0.8 else spoilt[: rng.integers(len(spoilt))])
        report = examine_folder(clean)
        assert report.cases == 16


def test_a_refusal_without_a_name_is_damage():
    assert refusal("a.png: something that nobody foresaw") == "damaged-file"


def test_neither_torch_nor_lightning_is_loaded(clean):
    code = (
        "import sys; from visattn.cli import main; "
        f"main(['doctor', {str(clean)!r}]); "
        f"main(['doctor', '--config', 'polyp_pranet', '--data.root', {str(clean)!r}]); "
        "sys.exit(', '.join({'torch', 'lightning', 'timm', 'matplotlib'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("0 errors") == 2


def test_the_page_lists_every_kind():
    page = (DOCS / "doctor.md").read_text()
    rows = re.findall(r"(?m)^\| `([a-z0-9-]+)` \| (\w+) \| (.+?) \| (.+?) \|$", page)
    assert rows == [(code, kind.severity, kind.meaning, kind.fix) for code, kind in KINDS.items()]


def test_codes_and_texts_are_of_one_form():
    for code, kind in KINDS.items():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", code)
        assert kind.fix.endswith(".")
        assert not kind.meaning.endswith(".")
        assert "|" not in kind.meaning + kind.fix


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_no_false_error_on_published_sets(real_data, name, capsys):
    assert main(["doctor", str(real_data / name)]) == 0
    assert "0 errors" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nifti_unlabelled", "medmnist"])
def test_published_volumes_without_labels_are_told_apart(real_data, name, capsys):
    assert main(["doctor", str(real_data / name)]) == 2
    assert ("no known layout" if name == "nifti_unlabelled" else "name one of them") in capsys.readouterr().err
