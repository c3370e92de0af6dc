"""Every kind of file that no reader should take, in one folder with good ones, through the command itself."""

import csv
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import visattn.networks
from visattn.cli import main

PLACE = Path(__file__).parent


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


stub = load("volume_stub", PLACE / "volume_stub.py")
bad = load("bad_volumes", PLACE.parent / "data" / "bad_volumes.py")

# Where the command knows more than the reader: how many channels the network takes.
MESSAGES = {
    "four_axes": r"holds 2 volumes along its fourth axis, but the network takes 1 channel",
    "five_axes": r"has more axes than three and channels",
}
# What of the header alone is refused as more than the file holds, is so before it is compared with a budget.
MESSAGES |= {f"32000_cubed{packed}": r"more than the file holds" for packed in ("", "_packed")}
SHAPE = (9, 7, 11)


class Seen(stub.Levels):
    """Keeps what it was shown."""

    def forward(self, x):
        self.windows.append(x.clone())
        return super().forward(x)


def array_of(seed):
    return np.random.default_rng(seed).random(SHAPE).astype(np.float32)


def good_files(folder):
    """Volumes that look odd and are whole; what each must become."""
    affine = np.diag([1, -2, 3, 1.0])
    odd = array_of(4)
    odd[2, 3, 4], odd[5, 5, 5] = np.nan, np.inf
    content = {
        "fine.nii.gz": bad.packed(nibabel.Nifti1Image(array_of(1), affine).to_bytes()),
        "of_version_2.nii": nibabel.Nifti2Image(array_of(2), affine).to_bytes(),
        "packed_without_saying_so.nii": bad.packed(nibabel.Nifti1Image(array_of(3), affine).to_bytes()),
        "some_voxels_nan.nii.gz": bad.packed(nibabel.Nifti1Image(odd, affine).to_bytes()),
        "axes_of_length_1.nii": nibabel.Nifti1Image(array_of(5)[..., None, None], affine).to_bytes(),
        "forms_differ.nii": bad.with_fields(
            nibabel.Nifti1Image(array_of(6), affine).to_bytes(), qform_code=1, qoffset_x=9.0
        ),
        "labels_as_floats.nii.gz": bad.packed(bad.nifti_of((array_of(7) > 0.5) * 0.99999997)),
        "constant.nii.gz": bad.packed(bad.nifti_of(np.zeros(SHAPE, np.int16))),
    }
    arrays = [array_of(1), array_of(2), array_of(3), odd, array_of(5), array_of(6), (array_of(7) > 0.5) * 1.0]
    arrays.append(np.zeros(SHAPE))
    for name, text in content.items():
        (folder / name).write_bytes(text)
    mean = odd[np.isfinite(odd)].mean()
    filled = [np.nan_to_num(array, nan=mean, posinf=mean) for array in arrays]
    return {name.split(".")[0]: array for name, array in zip(content, filled, strict=True)}


@pytest.fixture
def network(monkeypatch):
    """The network that the command makes of the checkpoint."""
    made = []

    def create_model(name, activation=None, **kwargs):
        made.append(Seen(**kwargs))
        made[-1].windows = []
        return made[-1]

    monkeypatch.setattr(visattn.networks, "create_model", create_model)
    return made


def test_each_bad_file_is_named_and_the_good_ones_finish(tmp_path, network, capfd):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    expected = good_files(folder)
    patterns = {path.name.split(".")[0]: message for path, message in bad.write_all(folder).items()} | MESSAGES
    assert len(patterns) == len(bad.CASES) >= 60
    (folder / "a_dead_link.nii").symlink_to(folder / "nowhere.nii")
    patterns["a_dead_link"] = r"no such file"
    (folder / "all_nan.nii").write_bytes(bad.nifti_of(np.full(SHAPE, np.nan, np.float32)))
    patterns["all_nan"] = r"all of its voxels are NaN or infinite"
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", patch=(8, 8, 8))
    wanted = ["--probabilities", "--uncertainty", "--overlays"]
    command = ["predict", str(folder), "--checkpoint", str(checkpoint), "--output", str(out), "--device", "cpu"]
    assert main([*command, *wanted]) == 1

    cases = json.loads((out / "manifest.json").read_text())["cases"]
    failed = {Path(case["image"]).name.split(".")[0]: case["error"] for case in cases if case["state"] == "failed"}
    assert set(failed) == set(patterns)
    for name, pattern in patterns.items():
        error = failed[name]
        assert re.search(pattern, error), f"{name}: {error}"
        assert f"{name}.nii" in error
        assert len(error.splitlines()) <= 3, error
        assert len(error) < 500 + len(str(folder)), error
        assert "Traceback" not in error

    # Each message once on the terminal, up to twenty; the first of them before a window of any volume was predicted.
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 21
    assert lines[-1] == "failed: more; all are listed in manifest.json"
    assert len({re.search(r"/(\w+)\.nii", line)[1] for line in lines[:-1]}) == 20
    assert told.count("failed: ") == 21
    assert told.rindex("failed: ") < told.index("note: ")
    assert f"{len(expected)} predicted" in told
    notes = [line for line in told.splitlines() if line.startswith("note: ")]
    assert len(notes) == 3
    for text in ("forms_differ.nii: its sform and qform lie up to 9 mm apart", "some_voxels_nan.nii.gz: 2 voxels are"):
        assert any(text in note for note in notes)
    assert any("constant.nii.gz: all of its voxels have the value 0" in note for note in notes)
    assert f"{len(patterns)} failed (listed in manifest.json)" in told
    assert "Traceback" not in told

    # Whole files of the good ones, and nothing else: no parts, no leftovers.
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != ".visattn.lock"}
    own = {f"{name}_{kind}.nii.gz" for name in expected for kind in ("mask", "prob", "uncertainty")}
    own |= {f"overlays/{name}.png" for name in expected}
    assert files == own | {"manifest.json", "volumes.csv", "report.html"}
    for name, array in expected.items():
        mask = np.asanyarray(nibabel.load(out / f"{name}_mask.nii.gz").dataobj)
        assert np.array_equal(mask, np.where(array >= 0.5, 5, 0)), name
    with (out / "volumes.csv").open(newline="") as handle:
        assert {row["case"] for row in csv.DictReader(handle)} == set(expected)
    page = (out / "report.html").read_text()
    assert all(name in page for name in patterns)

    # The network saw windows of the good volumes, 8 voxels over 9 x 7 x 11, and empty ones to be timed with, twice.
    assert len(network) == 1
    assert len(network[0].windows) == len(expected) * 2 * 1 * 2 + 2
    assert all(window.isfinite().all() for window in network[0].windows)

    # Once repaired, only that one is done.
    before = {name: (out / f"{name}_mask.nii.gz").stat().st_mtime_ns for name in expected}
    shutil.copy(folder / "fine.nii.gz", folder / "empty.nii")
    assert main([*command, *wanted]) == 1
    assert {name: (out / f"{name}_mask.nii.gz").stat().st_mtime_ns for name in expected} == before
    assert (out / "empty_mask.nii.gz").exists()


def test_only_bad_files(tmp_path, network, capfd):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.nii").write_bytes(b"text, and no volume" * 40)
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
    command = ["predict", str(tmp_path / "in"), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert "a.nii" in capfd.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*") if not path.name.startswith(".")) == [
        *("manifest.json", "report.html", "volumes.csv"),
    ]
    assert network[0].windows == []


def test_a_link_that_leads_out_of_the_output_is_refused_before_the_network_runs(tmp_path, network, capfd):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(array_of(0), np.eye(4)), tmp_path / "in" / "sub" / "a.nii")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
    command = ["predict", str(tmp_path / "in"), "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "a link that leads out of the output folder" in capfd.readouterr().err
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert network[0].windows == []


if sys.platform == "linux":

    def test_a_folder_that_cannot_be_written_to_is_told_before_the_checkpoint_is_read(tmp_path, network, capfd):
        nibabel.save(nibabel.Nifti1Image(array_of(0), np.eye(4)), tmp_path / "a.nii")
        checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt")
        command = ["predict", str(tmp_path / "a.nii"), "--checkpoint", str(checkpoint), "--output", "/proc/none"]
        assert main(command) == 2
        assert "/proc/none" in capfd.readouterr().err
        assert network == []
