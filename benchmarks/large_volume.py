"""Peak memory of a process that predicts one large volume with a near-free network under a bound.

    python benchmarks/large_volume.py 1024 1024 1024 --memory 4096       (about 20 minutes and 10 GB of disk)
    python benchmarks/large_volume.py 256 256 512 --memory 1280 --patch 64

The network is the one that tests of prediction use, tests/predict/volume_stub.py: its classes follow from the
intensity. The volume, made here and removed again, holds planes of two values as 8-bit numbers.
"""

import argparse
import importlib.util
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STUB = Path(__file__).resolve().parent.parent / "tests" / "predict" / "volume_stub.py"


def main() -> None:
    """Make the volume, predict it in a process of its own, print what that took."""
    from visattn.data import nifti

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", type=int, nargs=3, metavar="SIDE", help="voxels along the three axes")
    parser.add_argument("--memory", type=int, required=True, metavar="MIB", help="the bound")
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--patch", type=int, default=96, help="side of a window")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("volume_stub", STUB)
    assert spec is not None
    assert spec.loader is not None
    stub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stub)
    i, j, k = options.size
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        labels = {name: value for value, name in enumerate(string.ascii_lowercase[: options.classes])}
        checkpoint = stub.write_checkpoint(folder / "c.ckpt", labels, patch=(options.patch,) * 3)
        plane = np.zeros((i, j, 1), np.uint8)
        plane[::7] = 1
        with nifti.StreamWriter(folder / "volume.nii", nifti.Geometry((i, j, k), np.eye(4)), np.uint8) as writer:
            for index in range(k):
                writer.append(plane if index % 5 == 0 else np.zeros_like(plane))
        words = [sys.executable, str(STUB), str(checkpoint), str(folder / "out"), str(folder / "volume.nii")]
        began = time.perf_counter()
        done = subprocess.run(
            [*words, f"memory={options.memory << 20}"], capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
    seconds = time.perf_counter() - began
    print(f"{i} x {j} x {k}, {options.classes} classes: peak {done.stdout.split()[-1]} MiB, {seconds:.0f} s")


if __name__ == "__main__":
    main()
