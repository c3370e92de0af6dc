"""Inference in 3-D against MONAI on one core, both timed in turn in one run.

    python benchmarks/inference3d.py chris_t1.nii.gz [--rounds 5] [--width 8]

Times are CPU seconds of the thread, medians of the rounds; memory is what a process takes beyond what it had before,
each measure in a process of its own. Results are compared before anything is timed.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visattn.data import nifti
from visattn.data.intensity import Normalise
from visattn.data.volume_preprocessing import Plan, VolumePreprocessing
from visattn.labels import Labels
from visattn.memory import peak_bytes
from visattn.volume_inference import Engine

SIZE, PATCH = (165, 225, 167), (96, 96, 96)
Pair = tuple[Callable[[], Any], Callable[[], Any]]


class Free(nn.Module):
    """Nearly no work: one number a class and voxel."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = torch.linspace(-1, 1, classes).view(1, -1, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, *S) to (B, K, *S)."""
        return x * self.scale


def labels_of(classes: int) -> Labels:
    """`classes` classes."""
    return Labels.from_config({f"c{value}": value for value in range(classes)})


def identity(size: tuple[int, int, int]) -> Plan:
    """A plan in which nothing happens."""
    d, h, w = size
    return Plan(size, (0, 1, 2), (), (slice(0, d), slice(0, h), slice(0, w)), size, (1.0, 1.0, 1.0))


def windows(network: nn.Module, classes: int) -> Pair:
    """Labels of a head by sliding windows."""
    from monai.inferers import sliding_window_inference

    torch.manual_seed(0)
    volume = torch.randn(1, *SIZE)
    engine = Engine([network], labels_of(classes), patch=PATCH)
    plan = identity(SIZE)

    def ours() -> np.ndarray:
        return engine.run(volume, plan).indices

    @torch.no_grad()
    def monai() -> np.ndarray:
        logits = sliding_window_inference(volume[None], PATCH, 1, network, overlap=0.5, mode="gaussian")
        return logits.argmax(dim=1)[0].to(torch.uint8).numpy()

    return ours, monai


def preparing(path: Path) -> Pair:
    """A file to a normalised tensor of 1 mm."""
    from monai import transforms

    preprocessing = VolumePreprocessing(("t1",), (Normalise("zscore"),), spacing=(1.0, 1.0, 1.0))
    chain = transforms.Compose(
        [
            transforms.LoadImage(image_only=True, ensure_channel_first=True),
            transforms.Orientation("RAS"),
            transforms.Spacing((1.0, 1.0, 1.0), mode="bilinear"),
            transforms.NormalizeIntensity(),
        ]
    )

    def ours() -> np.ndarray:
        array, geometry = nifti.read(path)
        return preprocessing.forward(array[None], geometry)[0].numpy()

    return ours, lambda: np.asarray(chain(path))


def returning(path: Path, classes: int) -> Pair:
    """Probabilities at 1 mm to labels on the file's grid."""
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    from visattn.data.native_grid import bands, to_native
    from visattn.inference3d import largest

    array, geometry = nifti.read(path)
    plan = VolumePreprocessing(("t1",), (Normalise("none"),), spacing=(1.0, 1.0, 1.0)).plan(array[None], geometry)
    torch.manual_seed(0)
    coarse = torch.randn(classes, *(n // 8 + 1 for n in plan.size))
    found = nn.functional.interpolate(coarse[None], plan.size, mode="trilinear")[0].softmax(dim=0)
    axes = bands(plan.size, plan.cropped)

    def ours() -> np.ndarray:
        out = np.empty(plan.cropped, np.uint8)
        pieces = ((low, found[:, low : low + 48]) for low in range(0, plan.size[0], 48))
        for plane, row, block in to_native(pieces, axes, (0, plan.cropped[1]), 0):
            out[plane : plane + block.shape[1], row : row + block.shape[2]] = largest(block).numpy()
        return out

    scale = [own / mm for own, mm in zip(plan.cropped, plan.size, strict=True)]
    affine = geometry.affine @ np.diag([*scale, 1.0])
    affine[:3, 3] += geometry.affine[:3, :3] @ (np.array(scale) / 2 - 0.5)
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=torch.float32)

    def monai() -> np.ndarray:
        back = resample(MetaTensor(found, affine=affine), dst_affine=geometry.affine, spatial_size=plan.cropped)
        return back.argmax(dim=0).to(torch.uint8).numpy()

    return ours, monai


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds of this thread."""
    started = time.thread_time()
    call()
    return time.thread_time() - started


def compare(name: str, pair: Pair, rounds: int, least: float) -> None:
    """Print one row."""
    ours, monai = pair
    one, other = ours(), monai()
    if one.dtype == np.uint8:
        share = float((one == other).mean())
        agree = f"{100 * share:.3f} % of labels"
        assert share > least, f"{name}: only {share:.4f} of the labels agree"
    else:
        same = one.shape == other.shape
        inner = tuple(slice(8, -8) for _ in range(one.ndim - 1))
        agree = (
            f"r = {np.corrcoef(one[0][inner].ravel(), other[0][inner].ravel())[0, 1]:.4f}" if same else "sizes differ"
        )
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, found in zip(pair, times, strict=True):
            found.append(timed(call))
    a, b = (statistics.median(found) for found in times)
    print(f"| {name} | {1000 * b:.0f} ms | {1000 * a:.0f} ms | {a / b:.2f} | {b / a:.1f}x | {agree} |", flush=True)


def network_of(width: int, classes: int) -> nn.Module:
    """A light U-Net."""
    from visattn.networks import create_model

    torch.manual_seed(0)
    return create_model("unet3d", in_channels=1, classes=classes, filters=[width, 2 * width, 4 * width]).eval()


def overhead(width: int, rounds: int) -> None:
    """Time beyond the network's own, with a network that takes some."""
    network = network_of(width, 4)
    ours, monai = windows(network, 4)
    patches = torch.randn(1, 1, *PATCH)

    @torch.no_grad()
    def alone() -> None:
        for _ in range(36):
            network(patches)

    calls = (alone, ours, monai)
    times: list[list[float]] = [[], [], []]
    network(patches)
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            found.append(timed(call))
    own = statistics.median(times[0])
    # Of each round, since the network's time drifts more than the rest takes.
    extra = [statistics.median(t - n for t, n in zip(found, times[0], strict=True)) for found in times[1:]]
    share = f"{100 * extra[0] / own:.1f} % of the network's {own:.1f} s (MONAI {100 * extra[1] / own:.1f} %)"
    ratio = f"{extra[0] / extra[1]:.2f} | {extra[1] / extra[0]:.1f}x"
    figures = f"{1000 * extra[1]:.0f} ms | {1000 * extra[0]:.0f} ms | {ratio} | {share}"
    print(f"| overhead over a light U-Net, 4 classes | {figures} |")


def many(path: Path, count: int) -> None:
    """Wall time of `count` small volumes in one call, and of one volume in a call of its own times `count`."""
    from visattn.checkpoint import KEY, checkpoint_metadata

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "in").mkdir()
        array, geometry = nifti.read(path)
        small = np.ascontiguousarray(array[60:92, 90:138, 80:112])
        for index in range(count):
            grid = nifti.Geometry((32, 48, 32), geometry.affine)
            nifti.write(folder / "in" / f"{index:03}.nii.gz", small, grid, "image")
        labels = labels_of(3)
        config = {"name": "unet3d", "in_channels": 1, "classes": 3, "filters": [4, 8]}
        prepared = VolumePreprocessing(("t1",), (Normalise("zscore"),), patch=(32, 32, 32))
        content = checkpoint_metadata(
            recipe={},
            labels=labels.to_config(),
            preprocessing=prepared.to_config(),
            network=config,
            data={"description": "", "fingerprint": ""},
        )
        weights = network_of(4, 3)
        from visattn.networks import create_model

        weights = create_model(**config)
        state = {f"network.{key}": value for key, value in weights.state_dict().items()}
        torch.save({"state_dict": state, KEY: content}, folder / "c.ckpt")
        command = [sys.executable, "-m", "visattn", "predict", "--checkpoint", str(folder / "c.ckpt"), "--output"]
        seconds = []
        for given, output in (("in", "all"), ("in/000.nii.gz", "one"), ("in/001.nii.gz", "two")):
            started = time.perf_counter()
            run = [*command, str(folder / output), str(folder / given)]
            subprocess.run(run, check=True, stderr=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - started)
    single = min(seconds[1:])
    print(
        f"| {count} small volumes: calls one by one, one call (wall) | {count * single:.0f} s | {seconds[0]:.1f} s | "
        f"{seconds[0] / (count * single):.3f} | {count * single / seconds[0]:.0f}x | one call for one: {single:.1f} s |"
    )


def memory(side: str, classes: int) -> None:
    """Print what one call takes beyond what there was before, in MB."""
    call = windows(Free(classes), classes)[side == "monai"]
    before = peak_bytes()
    call()
    print((peak_bytes() - before) / 2**20)


def main() -> None:
    """Run all or what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--width", type=int, default=8, help="filters of the light U-Net's first level; 0 leaves it out"
    )
    parser.add_argument("--volumes", type=int, default=100, help="small volumes in one call; 0 leaves them out")
    parser.add_argument("--memory", nargs=2, metavar=("SIDE", "CLASSES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        memory(options.memory[0], int(options.memory[1]))
        return
    print("| | MONAI | visattn | share | faster | agreement |\n|---|---|---|---|---|---|")
    compare("file to normalised 1 mm tensor", preparing(options.volume), options.rounds, 0)
    for classes in (4, 30):
        name = f"probabilities to labels on the file's grid, {classes} classes"
        compare(name, returning(options.volume, classes), options.rounds if classes == 4 else 3, 0.99)
    for classes in (4, 30):
        name = f"sliding window, near-free network, {classes} classes"
        compare(name, windows(Free(classes), classes), options.rounds if classes == 4 else 3, 0.99)
    for classes in (4, 30):
        peaks = []
        for side in ("ours", "monai"):
            command = [sys.executable, __file__, str(options.volume), "--memory", side, str(classes)]
            peaks.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        a, b = peaks
        print(f"| peak memory of that, {classes} classes | {b:.0f} MB | {a:.0f} MB | {a / b:.2f} | {b / a:.1f}x | |")
    if options.width:
        overhead(options.width, max(1, options.rounds // 2))
    if options.volumes:
        many(options.volume, options.volumes)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
