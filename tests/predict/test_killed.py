import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from predict_fakes import rows, save_image, tree

from visattn.predict import predict_folder

CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fakes, visattn.networks
visattn.networks.create_model = fakes.create_model
from visattn import predict, predict_record
write, pause = predict.write_bytes_atomic, float(sys.argv[5])
def slow(path, data):
    time.sleep(pause)
    write(path, data)
predict.write_bytes_atomic = slow
predict_record.Record.save_sometimes = lambda self: self.save()
print("ready", flush=True)
sys.exit(predict.predict_folder([Path(sys.argv[2])], sys.argv[3], sys.argv[4], probabilities=True))
"""


def kill_and_resume(tmp_path, checkpoint, delays):
    for index in range(30):
        save_image(tmp_path / "in" / f"{index:02}.png", seed=index, size=(90, 70))
    predict_folder([tmp_path / "in"], checkpoint, tmp_path / "whole", probabilities=True)
    out = tmp_path / "out"
    killed = 0
    for delay in delays:
        command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), tmp_path / "in", checkpoint, out, "0.01"]
        child = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        killed += child.returncode == -signal.SIGKILL
        for path in out.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                if path.suffix == ".png":
                    assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(out)).read_bytes()
                elif path.suffix == ".json":
                    for entry in json.loads(path.read_text())["cases"]:
                        assert entry["state"] == "planned" or (out / entry["mask"]).exists()
                else:
                    assert len(path.read_text().splitlines()[0].split(",")) == 11
    assert predict_folder([tmp_path / "in"], checkpoint, out, probabilities=True) == 0
    assert tree(out) == tree(tmp_path / "whole")
    for name in tree(out):
        if name.endswith(".png"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / n)] for n in ("out", "whole")
    ]
    assert timeless[0] == timeless[1]
    return killed


def test_killed_once(tmp_path, checkpoint):
    assert kill_and_resume(tmp_path, checkpoint, [0.25]) == 1


@pytest.mark.slow  # each kill starts a process that imports torch
def test_killed_at_random_moments(tmp_path, checkpoint):
    rng = random.Random(0)
    assert kill_and_resume(tmp_path, checkpoint, [rng.uniform(0, 0.3) for _ in range(12)]) >= 6
