"""Small synthetic volumes like a hippocampus on MRI, with a front and a back part; for demonstrations and tests.

No image of a patient is in them: a bent tube of grey matter, thick in front, lies in white matter beside fluid and
other grey matter. The two labels differ in place and shape, hardly in brightness. As the heads of `phantom_head`, the
same on every machine: voxels come from +, -, *, / and square roots, and are rounded.

Legend: x across, y front, z up, in mm of the volume about its middle; I, J, K the voxel axes.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visattn.data._phantom_space import Field, blend, smooth_noise
from visattn.data.geometry import Geometry
from visattn.data.nifti import write
from visattn.data.phantoms import drawn_name
from visattn.files import write_text_atomic

FLUID, GREY, WHITE = 0.2, 0.5, 0.7


def phantom_hippocampus(index: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    """Draw a volume, in about 20 ms.

    Args:
        index: Which one; a longer series begins with the shorter one.
        seed: Of the series.

    Returns:
        Values (1, I, J, K), whole numbers; labels (I, J, K), 1 the front part and 2 the back part; and the grid, of
        voxels of 1 mm, some 35 x 50 x 35 of them, each axis in one direction or the other.
    """
    rng = np.random.default_rng((seed, index))
    draw = rng.uniform
    shape = (int(rng.integers(31, 41)), int(rng.integers(44, 57)), int(rng.integers(28, 40)))
    directions = np.where(rng.random(3) < 0.5, -1.0, 1.0)
    x, y, z = (
        np.float32(way) * (np.arange(n, dtype=np.float32) - np.float32((n - 1) / 2)).reshape(flat)
        for way, n, flat in zip(directions, shape, ((-1, 1, 1), (1, -1, 1), (1, 1, -1)), strict=True)
    )
    grains = {mm: smooth_noise(rng, shape, (1.0, 1.0, 1.0), mm) for mm in (4.0, 9.0, 16.0, 30.0)}

    # The middle line bends inwards and rises towards the back; the tube thins out from front to back.
    length = np.float32(draw(16, 20))
    along = y / length
    middle_x = np.float32(draw(-2, 2)) + np.float32(draw(2, 5)) * along * along
    middle_z = np.float32(draw(-2, 2)) - np.float32(draw(2, 5)) * along
    radius = np.float32(draw(4.4, 5.6)) + np.float32(draw(1.0, 2.0)) * np.clip(along, -1, 1)
    far = np.maximum(np.abs(along) - np.float32(0.8), 0) * length
    away = np.sqrt((x - middle_x) ** 2 + ((z - middle_z) * np.float32(draw(1.1, 1.4))) ** 2 + far * far)
    depth = radius - away + np.float32(0.8) * grains[9.0]

    image = np.full(shape, WHITE, np.float32)
    blend(image, GREY, _share(np.abs(grains[16.0]) * 6 - 4))  # cortex
    horn = np.sqrt((x - middle_x - np.float32(7)) ** 2 + (z - middle_z - np.float32(3)) ** 2 + far * far)
    blend(image, FLUID, _share(np.float32(draw(1.5, 4)) - horn + grains[9.0]))  # the ventricle beside it
    blend(image, FLUID, _share(np.float32(draw(2, 4)) + middle_x - radius - x - np.float32(6) + grains[9.0]))
    blend(image, GREY + draw(-0.04, 0.04), _share(depth))
    image *= 1 + np.float32(0.08) * grains[30.0]
    image += np.float32(0.03) * grains[4.0] * image
    image += np.float32(draw(0.01, 0.03)) * rng.standard_normal(shape, np.float32)

    labels = np.where(depth > 0, np.where(along > np.float32(draw(-0.1, 0.35)), 1, 2), 0).astype(np.uint8)
    affine = np.diag([*directions, 1.0])
    affine[:3, 3] = -directions * (np.array(shape) - 1) / 2
    values = np.rint(np.maximum(image, 0) * np.float32(draw(80, 900)))
    return values[None], labels, Geometry(shape, affine)


def write_hippocampi(folder: Path | str, count: int, seed: int, written: Callable[[], None] = lambda: None) -> None:
    """Write volumes in the layout of the Decathlon, ready to be a `root`; `written` is called after each."""
    folder = Path(folder)
    for index in range(count):
        image, labels, geometry = phantom_hippocampus(index, seed)
        name = f"{drawn_name('hippocampus', index)}.nii.gz"
        write(folder / "imagesTr" / name, image[0], geometry, kind="image")
        write(folder / "labelsTr" / name, labels, geometry, kind="labels")
        written()
    content = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    write_text_atomic(folder / "dataset.json", json.dumps(content, indent=2) + "\n")


def _share(depth: Field) -> Field:
    """Share of a voxel that lies inside a surface, from its depth in mm."""
    return np.clip(np.asarray(depth, np.float32) + np.float32(0.5), 0, 1)
