"""Small synthetic heads with meningioma-like lesions, for demonstrations and tests of volumes.

No image of a patient is in them: scalp, skull, meninges, folded cortex, ventricles, cerebellum, eyes and face are drawn
from random numbers as contrast-enhanced T1 would show them, with a bias field and Rician noise. A lesion sits on the
inner side of the skull or on the falx, is bright, and displaces what would be there; fat of the scalp and the venous
sinuses are as bright, so that no threshold finds it. Two heads in ten hold none.

The same on every machine: whatever acts on voxels is made of +, -, *, / and square roots, which IEEE 754 rounds alike
everywhere, and values are rounded to whole numbers as a scanner's are.

Legend: x right, y front, z up, in mm of the head about the middle of its cavity; I, J, K the voxel axes.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visattn.data._phantom_space import Field, Point, Scan, Space, blend, draw_scan, step
from visattn.data.geometry import Geometry
from visattn.data.nifti import write
from visattn.data.phantoms import drawn_name
from visattn.files import write_text_atomic

SMALLEST_ML, LARGEST_ML = 0.3, 50.0
"""Volumes of lesions; their logarithms are spread evenly."""

_NUMBERS = (0.2, 0.6, 0.13, 0.07)  # shares of heads with 0, 1, 2 and 3 lesions
_APART = 10.0  # mm between two lesions, so that they never touch

AIR, BONE, FLUID, GREY, WHITE, MUSCLE, FAT, BLOOD = 0.01, 0.08, 0.15, 0.45, 0.66, 0.42, 0.95, 1.05


def phantom_head(index: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    """Draw a head, in about a third of a second.

    Args:
        index: Which one; a longer series begins with the shorter one.
        seed: Of the series.

    Returns:
        Values (1, I, J, K), whole numbers of 0 to some 4000; labels (I, J, K), 1 where a lesion is; and the grid, whose
        axes, voxel sizes and tilt differ from head to head. 64 to 128 voxels a side of 1.7 to 3 mm.
    """
    rng = np.random.default_rng((seed, index))
    wanted = _lesions(rng)
    scan = draw_scan(rng)
    return *_draw(rng, scan, wanted), scan.geometry


def lesion_volumes(index: int, seed: int) -> tuple[float, ...]:
    """The volumes in ml that the lesions of a head were drawn to have, without drawing it."""
    return _lesions(np.random.default_rng((seed, index)))


def write_heads(folder: Path | str, count: int, seed: int, written: Callable[[], None] = lambda: None) -> None:
    """Write heads as a raw data set of nnU-Net (version 2), ready to be a `root`; `written` is called after each."""
    folder = Path(folder)
    for index in range(count):
        image, labels, geometry = phantom_head(index, seed)
        name = drawn_name("head", index)
        write(folder / "imagesTr" / f"{name}_0000.nii.gz", image[0], geometry, kind="image")
        write(folder / "labelsTr" / f"{name}.nii.gz", labels, geometry, kind="labels")
        written()
    content = {
        "channel_names": {"0": "T1c"},
        "labels": {"background": 0, "meningioma": 1},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    write_text_atomic(folder / "dataset.json", json.dumps(content, indent=2) + "\n")


def _lesions(rng: np.random.Generator) -> tuple[float, ...]:
    number = int(rng.choice(len(_NUMBERS), p=_NUMBERS))
    low, high = math.log(SMALLEST_ML), math.log(LARGEST_ML)
    return tuple(math.exp(rng.uniform(low, high)) for _ in range(number))


def _draw(rng: np.random.Generator, scan: Scan, wanted: tuple[float, ...]) -> tuple[Field, NDArray[np.uint8]]:
    space = Space(rng, scan)
    inside, radial = _cavity(space)
    image = _outer_head(space, inside, radial)
    labels = np.zeros(space.shape, np.uint8)
    box = space.box((0, 0, 0), (66, 85, 64))
    part, cavity = space.crop(box), inside[box]
    falx = _brain(part, image[box], cavity)
    done: list[tuple[Point, float]] = []
    for ml in wanted:
        _lesion(part, image[box], labels[box], cavity, falx, ml, scan.geometry.voxel_ml, done)
    gain = rng.uniform(500, 1500)
    image *= np.clip(1 + rng.uniform(0.05, 0.2) * space.noise(110), 0.4, 2)
    image += 0.012 * space.noise(6) * image
    noise = rng.uniform(0.012, 0.035)
    real = image + noise * rng.standard_normal(space.shape, np.float32)
    other = noise * rng.standard_normal(space.shape, np.float32)
    magnitude = np.sqrt(real * real + other * other)
    return np.rint(magnitude * np.float32(gain))[None], labels


def _cavity(space: Space) -> tuple[Field, Field]:
    """How deep a voxel lies inside the skull: above its base, and by the vault alone."""
    x, y, z = space.x, space.y, space.z
    r = x * x + y * y + z * z
    p = (x / (66 - 0.08 * y)) ** 2 + (y / 85) ** 2 + (z / 64) ** 2  # wider behind
    radius = np.sqrt((r + 1) / (p + np.float32(1 / 4900)))
    vault = radius * (1 - np.sqrt(p))
    side = np.abs(x)
    ahead = step(y, -24, 16)
    base = -63 + 20 * ahead + 17 * step(y, 26, 14) + 17 * ahead * (1 - step(side, 12, 10)) * (1 - step(y, 26, 14))
    return np.minimum(vault, z - base), vault


def _outer_head(space: Space, inside: Field, vault: Field) -> Field:
    """Scalp, skull, face and neck; the cavity is still empty."""
    below = np.minimum(-30 - space.z, 0) * 0.6
    face = space.ball((0, 42, -58), (56, 54, 66))
    neck = np.minimum((1 - np.sqrt((space.x / 54) ** 2 + ((space.y + 20) / 56) ** 2)) * 54, 12 + below)
    nose = space.ball((0, 97, -48), (13, 17, 24))
    cranium = vault + np.float32(space.rng.uniform(12, 15))
    cranium = np.minimum(cranium, space.z + 58)
    head = np.maximum(np.maximum(cranium, face), np.maximum(neck, nose))
    image = np.full(space.shape, AIR, np.float32)
    blend(image, 0.62, space.soft(head))  # skin
    blend(image, FAT, space.soft(head - 2.2))
    grain = space.noise(9)
    blend(image, MUSCLE + 0.12 * np.maximum(grain, 0), space.soft(head - 8 - 2 * grain) * space.soft(-40 - space.z))
    for centre, radii, value in (
        ((33, 68, -34), (18, 24, 17), FAT),  # orbit
        ((33, 74, -34), (12.5, 12.5, 12.5), FLUID),  # eye
        ((27, 54, -62), (14, 15, 16), AIR),  # maxillary sinus
        ((9, 55, -56), (7, 30, 20), 0.3),  # nasal cavity
        ((0, 24, -85), (12, 9, 30), AIR),  # throat
        ((10, 84, -14), (10, 5, 9), AIR),  # frontal sinus
        ((56, -18, -42), (9, 14, 12), 0.15),  # mastoid
    ):
        space.paint(image, value, centre, radii, turn=0)
    space.paint(image, 0.36, (0, -34, -110), (20, 18, 55))  # spine
    space.paint(image, 0.55, (0, -30, -120), (8, 8, 52))
    shell = 7 + space.noise(40)
    bone = np.minimum(-inside, inside + shell)
    bone = np.minimum(bone, np.where(vault < -shell, np.minimum(head - 9, 3), 9))
    blend(image, BONE, space.soft(bone))
    marrow = np.minimum(bone - 2.2, 1.5)
    blend(image, 0.42, space.soft(marrow) * 0.8)
    return image


def _brain(space: Space, image: Field, inside: Field) -> Field:
    """Draw what is inside the skull; the depth in mm within the falx is returned."""
    x, y, z = space.x, space.y, space.z
    side = np.abs(x)
    blend(image, FLUID, space.soft(inside))

    # Depth below the surface of the cortex: below the skull, off the fissure, and off the nearest sulcus.
    callosum = np.maximum(1 - np.sqrt((y / 56) ** 2 + ((z + 4) / 36) ** 2), 0) * 60
    fissure = side - 1.0 + callosum + np.maximum(-18 - z, 0)
    sulcus = np.abs(space.noise(7.5)) * 4.5 + np.maximum(inside - 10, 0) * 0.5
    other = np.abs(space.noise(12)) * 7 + np.maximum(inside - 16, 0) * 0.6  # the deep ones
    sylvian = np.sqrt(((y - 8 + 0.5 * (z + 8)) * 0.18) ** 2 + ((z + 8 - 0.25 * y) * 0.8) ** 2) - 1.5
    sylvian += np.maximum(inside - 24, 0) * 0.8 + np.maximum(np.abs(y - 4) - 32, 0) * 0.5
    cortex = np.minimum(np.minimum(sulcus, other) - 0.9, np.minimum(inside - 2.2, np.minimum(fissure, sylvian)))

    tent = -14 - 0.25 * y - 10 * step(side, 0, 60)  # above it the cerebrum
    behind = space.ball((0, -46, -38), (50, 34, 27))
    behind = np.minimum(np.minimum(behind, inside - 1.5), tent - 26 - z + 14)
    cortex = np.where(y < -4, np.minimum(cortex, z - tent + 12 + np.maximum(y + 16, 0) * 3), cortex)
    blend(image, GREY, space.soft(cortex))
    blend(image, WHITE, space.soft(cortex - space.rng.uniform(2.4, 3.0)))

    for middle, size in (((11, -8, 3), (9, 14, 9)), ((27, 8, 2), (6, 19, 11)), ((14, 24, 9), (5, 10, 8))):
        space.paint(image, 0.55, middle, size, turn=0)  # the grey matter within
    folia = np.abs(space.noise(5))
    blend(image, GREY - 0.2 * np.maximum(0.45 - folia, 0), space.soft(behind))
    space.paint(image, WHITE - 0.04, (17, -44, -38), (17, 13, 9), turn=0)
    space.paint(image, WHITE - 0.02, (0, -20, -36), (16, 13, 22))
    space.paint(image, WHITE - 0.02, (0, -28, -70), (9, 9, 60))

    swell = space.rng.uniform(0.75, 1.35)
    horns: tuple[tuple[Point, Point], ...] = (
        ((9, 10, 12), (6 * swell, 30, 7 * swell)),
        ((13, -30, 6), (7 * swell, 17, 9 * swell)),
        ((30, -6, -16), (3.5 * swell, 20, 4 * swell)),
    )
    for centre, radii in horns:
        space.paint(image, FLUID, centre, radii, turn=0.35)  # the horns part towards the back
    space.paint(image, FLUID, (0, 0, -2), (2.4 * swell, 13, 11))
    space.paint(image, FLUID, (0, -36, -40), (6 * swell, 4.5, 9))

    # What takes up contrast: dura, falx, sinuses, and vessels in the sulci.
    falx = np.minimum(0.9 - side, -0.5 - callosum + np.minimum(z + 18, 3))
    falx = np.minimum(falx, inside)
    blend(image, 0.6, space.soft(falx) * 0.7)
    blend(image, 0.62, space.soft(0.8 - np.abs(inside - 0.4)) * 0.8)
    vessel = np.minimum(1.2 - np.abs(space.noise(12)) * 6, 1.2 - np.abs(space.noise(16)) * 8)
    blend(image, 0.9, space.soft(np.minimum(vessel, inside)) * space.soft(1.5 - cortex) * 0.6)
    upper = np.minimum(4.2 - np.sqrt(side**2 + (inside - 3) ** 2), np.maximum(z, -y - 40))
    across = np.minimum(4 - np.sqrt((z - tent + 6) ** 2 + (inside - 2.5) ** 2), -y - 25)
    blend(image, BLOOD, space.soft(np.maximum(upper, across)))
    space.paint(image, BLOOD, (13, 8, -28), (2.6, 2.6, 9), turn=0)  # carotid arteries
    space.paint(image, BLOOD, (0, -4, -34), (2.4, 2.4, 12))
    return np.asarray(falx)


def _lesion(
    space: Space,
    image: Field,
    labels: NDArray[np.uint8],
    inside: Field,
    falx: Field,
    ml: float,
    voxel_ml: float,
    done: list[tuple[Point, float]],
) -> None:
    """Grow a lesion of `ml` on the dura or the falx, away from those before."""
    rng = space.rng
    radius = (3000 * ml / (4 * math.pi)) ** (1 / 3)
    for _ in range(100):
        on_falx = rng.random() < 0.15
        a, b, c = rng.standard_normal(3).tolist()
        c = abs(c) if rng.random() < 0.8 else -0.4 * abs(c)
        far = 95 / math.sqrt(a * a + b * b + c * c)
        way = (0.0, rng.uniform(-50, 55), rng.uniform(25, 55)) if on_falx else (far * a, far * b, far * c)
        wall = falx > -1.5 if on_falx else np.abs(inside - 1) < 2
        away = (space.x - way[0]) ** 2 + (space.y - way[1]) ** 2 + (space.z - way[2]) ** 2
        nearest = np.unravel_index(int(np.where(wall, away, np.float32(1e9)).argmin()), space.shape)
        spot = tuple(float(field[nearest]) for field in (space.x, space.y, space.z))
        length = math.sqrt(sum(value * value for value in spot)) + 1e-3
        inwards = (rng.choice((-1, 1)).item(), 0, 0) if on_falx else tuple(-value / length for value in spot)
        x, y, z = (value + 0.4 * radius * by for value, by in zip(spot, inwards, strict=True))
        if all(math.dist((x, y, z), other) > 1.3 * (radius + size) + _APART for other, size in done):
            break
    done.append(((x, y, z), radius))
    uneven = 1 + rng.uniform(0.05, 0.16) * space.noise(max(1.6 * radius, 6.0))
    reach = uneven * np.sqrt((space.x - x) ** 2 + (space.y - y) ** 2 + (space.z - z) ** 2)
    within = np.where(inside > 0, reach, np.float32(1e9))
    number = max(1, round(ml / voxel_ml))
    # The voxels that come first fill the volume exactly, whatever the shape of the skull leaves of it.
    order = np.argpartition(within, number, axis=None)
    limit = float(within.flat[order[number]])
    labels.flat[order[:number]] = 1

    if rng.random() < 0.5:  # swollen white matter around it, darker
        halo = step(-reach, -limit - rng.uniform(6, 16), 6) * step(image, 0.5 * (GREY + WHITE), 0.1)
        blend(image, 0.44, halo * 0.8)
    share = space.soft(limit - within)
    tail = space.soft(1.5 - np.abs(inside - 1)) * step(-reach, -1.5 * limit - 4, 5)
    bright = rng.uniform(0.92, 1.3)
    blend(image, bright, tail * 0.6)
    blend(image, FLUID, space.soft(1.2 - np.abs(within - limit - 1.2)) * space.soft(inside - 3) * 0.6)  # a cleft
    value = bright + rng.uniform(0.03, 0.1) * space.noise(7)
    if ml > 8 and rng.random() < 0.3:  # a core that takes up little
        value -= 0.45 * step(-reach, -0.5 * limit, 0.3 * limit)
    blend(image, value, share)
