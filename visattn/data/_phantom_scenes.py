"""Synthetic pictures of skin lesions, retinal vessels and cell nuclei; simpler than the colonoscopy of `phantom.py`.

Each function draws one picture (H, W, 3) with its mask (H, W) of 0 and 255 from a generator. Lengths are in units of
the image height. What a person would call the difficulty is there: hairs and shadows over lesions with soft edges,
vessels that thin out to a pixel and less, nuclei that touch, fade and lie out of focus.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from visattn.data._phantom_noise import Field, Noise

Scene = tuple[NDArray[np.uint8], NDArray[np.uint8]]

_FINE = 4  # lines are drawn on a grid so many times as fine, and averaged


def skin_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """A pigmented lesion through a dermatoscope: one in every picture, dark or hardly darker than the skin."""
    noise, draw = Noise(rng, height, width), rng.uniform
    x, y = _plane(height, width)
    skin = np.array([0.86, 0.66, 0.56], np.float32) * draw(0.75, 1.1) + rng.normal(0, 0.03, 3).astype(np.float32)
    image = skin * cv2.merge([1 + 0.02 * noise(3)] * 3) * (1 + 0.03 * noise(40))[..., None]
    depth = _blob(rng, x - draw(-0.2, 0.2), y - draw(-0.12, 0.12), draw(0.12, 0.36))
    depth += 0.012 * noise(14)
    share = np.clip(0.5 + depth / draw(0.01, 0.05), 0, 1)
    dark = draw(0.25, 0.75)
    pigment = np.array([0.42, 0.27, 0.2], np.float32) + rng.normal(0, 0.04, 3).astype(np.float32)
    spots = 1 + 0.22 * noise(7) + 0.12 * noise(24) * (rng.random() < 0.6)  # clods or a network
    amount = np.clip(share * dark * spots, 0, 1)[..., None]
    image = image * (1 - amount) + pigment * amount
    if rng.random() < 0.4:  # a pale or reddish part
        place = np.clip(_blob(rng, x - draw(-0.2, 0.2), y - draw(-0.15, 0.15), draw(0.05, 0.12)) * 30, 0, 1) * share
        image = image * (1 - 0.4 * place[..., None]) + 0.4 * place[..., None] * np.array([0.8, 0.5, 0.5], np.float32)
    hairs = np.zeros((height * _FINE, width * _FINE), np.uint8)
    for _ in range(int(rng.choice([0, 3, 9], p=[0.4, 0.4, 0.2]))):
        bend, turn = draw(-1.5, 1.5), draw(0, math.tau)
        _line(hairs, _walk(rng, draw(-0.6, 0.6), draw(-0.5, 0.5), turn, draw(0.3, 1.0), bend, 0.05), draw(0.004, 0.008))
    image *= (1 - 0.75 * _averaged(hairs, height, width))[..., None]
    edge = draw(0.45, 0.9) * (0.5 + 0.5 * width / height)
    window = np.clip((edge - np.hypot(x, y)) * 40, 0, 1) if rng.random() < 0.3 else np.ones_like(x)
    image *= (window * (1 - draw(0.1, 0.5) * (x**2 + y**2)))[..., None]
    return _camera(rng, image, height * 0.004, 3), _mask((depth > 0) & (window > 0.5))


def vessels_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """The back of an eye: trees of vessels that leave the optic disc, arteries brighter than veins."""
    noise, draw = Noise(rng, height, width), rng.uniform
    x, y = _plane(height, width)
    side = rng.choice([-1.0, 1.0]).item()
    disc = side * draw(0.22, 0.3), draw(-0.06, 0.06)
    ground = np.array([0.78, 0.36, 0.16], np.float32) * draw(0.7, 1.15)
    image = ground * (1 + 0.1 * noise(2) + 0.05 * noise(9) + 0.03 * noise(30))[..., None]
    image *= (1 - 0.4 * np.exp(-((x + 0.4 * disc[0]) ** 2 + (y - disc[1]) ** 2) / 0.006))[..., None]  # the fovea
    bright = np.clip((draw(0.055, 0.075) - np.hypot(x - disc[0], y - disc[1]) - 0.003 * noise(9)) * 60, 0, 1)
    image += bright[..., None] * np.array([0.25, 0.35, 0.25], np.float32)
    shape = height * _FINE, width * _FINE
    every, wall, reflex = (np.zeros(shape, np.uint8) for _ in range(3))
    for up in (-1, 1):
        for kind in ("vein", "artery"):
            for away in (-1.0, 1.0):  # towards the fovea, which the main branches arch around, and away from it
                turn = math.atan2(up, -side * away * draw(0.3, 0.8))
                bend = -up * side * away * draw(0.8, 2.2)
                branches: list[tuple[NDArray[np.float64], float]] = []
                _tree(rng, branches, *disc, turn, bend, draw(0.014, 0.02) * (1 if kind == "vein" else 0.8), 0)
                for path, thick in branches:
                    _line(every, path, thick)
                    _line(wall, path, thick, 255 if kind == "vein" else 190)
                    _line(reflex, path, thick * (0.25 if kind == "artery" else 0))
    inside = np.hypot(x, y) < 0.49
    dark = _averaged(wall, height, width) * (0.45 + 0.08 * noise(4))
    image *= 1 - dark[..., None] * np.array([0.6, 1.0, 0.9], np.float32)
    image += 0.12 * _averaged(reflex, height, width)[..., None]
    image *= (inside * (1 - draw(0.4, 1.4) * (x**2 + y**2)))[..., None]
    return _camera(rng, image, height * 0.003, 4), _mask((_averaged(every, height, width) > 0.5) & inside)


def nuclei_scene(rng: np.random.Generator, height: int, width: int) -> Scene:
    """Nuclei under the microscope: bright on black by fluorescence, or in one picture of five stained, dark on pink."""
    noise, draw = Noise(rng, height, width), rng.uniform
    x, y = _plane(height, width)
    stained = rng.random() < 0.2
    size, mask = draw(0.03, 0.075), np.zeros((height, width), bool)
    signal = np.zeros((height, width), np.float32)
    cells = draw(0.05, 0.3) * np.clip(noise(4), 0, None)  # what cytoplasm gives of the dye
    for _ in range(int(rng.integers(6, max(8, int(0.16 / size**2))))):
        at = draw(-0.55, 0.55) * width / height, draw(-0.55, 0.55)
        depth = _blob(rng, x - at[0], y - at[1], size * draw(0.7, 1.3), stretch=1.7)
        blur = draw(0.004, 0.02)
        body = np.clip(0.5 + depth / blur, 0, 1) * draw(0.3, 1.0) * (1 + 0.15 * noise(30))
        signal, mask = np.maximum(signal, body), mask | (depth > 0)
    signal = np.clip(signal, 0, 1.2)
    if stained:
        pink, blue = np.array([0.9, 0.72, 0.85], np.float32), np.array([0.4, 0.27, 0.6], np.float32)
        amount = signal[..., None] * 0.9
        image = pink * (1 - 0.25 * cells - 0.04 * np.abs(noise(9)))[..., None] * (1 - amount) + blue * amount
    else:
        image = np.repeat((0.03 + draw(0.3, 0.95) * signal + 0.2 * cells)[..., None], 3, axis=-1)
    return _camera(rng, image, height * 0.003, draw(2, 6)), _mask(mask)


def _plane(height: int, width: int) -> tuple[Field, Field]:
    y, x = (np.mgrid[:height, :width].astype(np.float32) + 0.5) / height
    return x - 0.5 * width / height, y - 0.5


def _blob(rng: np.random.Generator, x: Field, y: Field, size: float, stretch: float = 1.5) -> Field:
    """How deep a pixel lies in an uneven ellipse of radius `size` about the origin; below 0 outside."""
    turn, long = rng.uniform(0, math.pi), rng.uniform(1, stretch)
    along = (math.cos(turn) * x + math.sin(turn) * y) / long
    aside = math.cos(turn) * y - math.sin(turn) * x
    radius, theta = cv2.cartToPolar(along, aside)
    outline = np.full(theta.shape, size, np.float32)
    for wave in (2, 3, 4, 5):
        outline += float(rng.normal(0, 0.15 / wave)) * size * np.cos(wave * theta + rng.uniform(0, math.tau))
    return np.asarray(outline - radius, np.float32)


def _walk(
    rng: np.random.Generator, x: float, y: float, turn: float, length: float, bend: float, wobble: float
) -> NDArray[np.float64]:
    """A line (N, 2) that starts at (x, y) towards `turn` and bends by `bend` a unit of length, unevenly."""
    steps = max(2, round(length / 0.01))
    angles = turn + np.cumsum(np.full(steps, bend * 0.01) + rng.normal(0, wobble, steps))
    steps_xy = 0.01 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([[[x, y]], np.array([x, y]) + np.cumsum(steps_xy, axis=0)])


def _tree(
    rng: np.random.Generator,
    branches: list[tuple[NDArray[np.float64], float]],
    x: float,
    y: float,
    turn: float,
    bend: float,
    thick: float,
    depth: int,
) -> None:
    """Grow a vessel and its branches into `branches`, each thinner than what it leaves."""
    path = _walk(rng, x, y, turn, rng.uniform(0.12, 0.3) * 0.85**depth, bend, 0.07)
    branches.append((path, thick))
    if depth == 5 or thick < 0.0035:
        return
    end, before = path[-1], path[-2]
    ahead = math.atan2(end[1] - before[1], end[0] - before[0])
    apart = rng.uniform(0.35, 0.9) * rng.choice([-1.0, 1.0]).item()
    _tree(rng, branches, end[0], end[1], ahead - 0.25 * apart, 0.7 * bend, thick * rng.uniform(0.8, 0.93), depth + 1)
    _tree(rng, branches, end[0], end[1], ahead + apart, 0.0, thick * rng.uniform(0.5, 0.75), depth + 1)


def _line(canvas: NDArray[np.uint8], path: NDArray[np.float64], thick: float, value: int = 255) -> None:
    """Draw a line on the fine grid."""
    height, width = canvas.shape
    pixels = round(thick * height)
    if pixels:
        points = np.rint((path + np.array([0.5 * width / height, 0.5])) * height).astype(np.int32)
        cv2.polylines(canvas, [points], False, value, pixels)


def _averaged(canvas: NDArray[np.uint8], height: int, width: int) -> Field:
    """The share of each pixel that lines on the fine grid cover."""
    return np.asarray(cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA), np.float32) / np.float32(255)


def _camera(rng: np.random.Generator, image: Field, blur: float, noise: float) -> NDArray[np.uint8]:
    """Blur and sensor noise on values of 0 to 1."""
    soft = np.asarray(cv2.GaussianBlur(image, (0, 0), max(blur, 0.3)), np.float32)
    return np.clip(soft * 255 + noise * rng.standard_normal(soft.shape, np.float32), 0, 255).astype(np.uint8)


def _mask(inside: NDArray[np.bool_]) -> NDArray[np.uint8]:
    return inside.astype(np.uint8) * 255
