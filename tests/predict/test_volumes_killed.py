import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

import visattn.networks
from visattn.predict_volumes import predict_volumes

PLACE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("volume_stub", PLACE / "volume_stub.py")
stub = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub)


@pytest.fixture(autouse=True)
def bright_network(monkeypatch):
    """Instead of that of images."""
    monkeypatch.setattr(visattn.networks, "create_model", stub.create_model)


def _check(out, whole):
    """What has a final name is whole, and in the manifest as long as it is."""
    for path in out.glob("*.nii.gz"):
        if not path.name.startswith("."):
            assert path.read_bytes() == whole[path.name]
    if (out / "manifest.json").exists():
        for entry in json.loads((out / "manifest.json").read_text())["cases"]:
            assert entry["state"] == "planned" or (out / entry["mask"]).exists()


def _say(server, line):
    server.stdin.write(f"{line}\n".encode())
    server.stdin.flush()


def kill_and_resume(tmp_path, count, kills, longest):
    """Kill at random moments: what has a final name is whole, and in the end all is as if nothing had happened."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for index in range(count):
        array = rng.random((20, 24, 16)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1, -2, 3, 1.0])), tmp_path / "in" / f"{index:02}.nii.gz")
    checkpoint = stub.write_checkpoint(tmp_path / "c.ckpt", {"none": 0, "a": 1, "b": 2})
    wanted = {"probabilities": True, "uncertainty": True}
    assert predict_volumes([tmp_path / "in"], checkpoint, tmp_path / "whole", **wanted) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.nii.gz")}
    out = tmp_path / "out"
    clock = random.Random(0)
    killed = 0
    command = [sys.executable, PLACE / "volume_stub.py", checkpoint, out, tmp_path / "in"]
    command = [str(part) for part in command] + ["probabilities=1", "uncertainty=1", "serve"]
    # Forks of one process that has imported torch: fifty imports would take most of the time.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        for index in range(kills):
            _say(server, "again" if index % 3 else "go on")  # else all is done after a few times
            assert server.stdout.readline() == b"ready\n"
            time.sleep(clock.uniform(0, longest))
            _say(server, "kill")
            code = int(server.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            killed += code == -signal.SIGKILL
            _check(out, whole)
        server.stdin.close()
    assert predict_volumes([tmp_path / "in"], checkpoint, out, **wanted) == 0
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == whole
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())
    return killed


@pytest.mark.slow  # starts a process that imports torch
def test_killed_once(tmp_path):
    assert kill_and_resume(tmp_path, 6, 1, 0.2) == 1


@pytest.mark.slow  # fifty predictions
def test_killed_fifty_times(tmp_path):
    assert kill_and_resume(tmp_path, 30, 50, 1.5) >= 25


@pytest.mark.slow  # half a gigabyte of voxels
def test_memory_is_bounded(tmp_path):
    """The peak of a process, measured, for a volume and for one four times as deep, whose maps alone take 1 GiB."""
    checkpoint = stub.write_checkpoint(
        tmp_path / "c.ckpt", {name: value for value, name in enumerate("abcdefgh")}, patch=(64, 64, 64)
    )
    peaks = []
    for depth in (128, 512):
        array = np.zeros((256, 256, depth), np.float32)
        array[::7, :, ::5] = 0.4
        path = tmp_path / f"{depth}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
        command = [sys.executable, PLACE / "volume_stub.py", checkpoint, tmp_path / f"out{depth}", path]
        words = [*map(str, command), f"memory={5 << 28}"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    # Python and torch take some 700 MiB of it; with 1 GiB in all, a case may be refused.
    assert max(peaks) <= 1280
    assert peaks[1] - peaks[0] <= 100
