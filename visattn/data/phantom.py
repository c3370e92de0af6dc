"""Small synthetic images that look like colonoscopy, for demonstrations and tests; and the door to the other kinds.

No image of a patient is in them: a height map of a colon wall with folds and polyps is drawn from random numbers, lit
from the camera, and coloured. A polyp differs from its surroundings in shape, texture and, a little and not always, in
colour; so a threshold on colour does not find it. About a tenth of the images hold none. Lengths are in units of the
image height, so that any size shows the same scene.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from visattn.data._phantom_noise import Field, Noise
from visattn.data._phantom_scenes import nuclei_scene, skin_scene, vessels_scene
from visattn.data.phantoms import drawn_name
from visattn.errors import chosen
from visattn.files import write_bytes_atomic

SIZE = (144, 176)
"""Height and width of the images by default."""

_MUCOSA = np.array(
    [[0.92, 0.46, 0.38], [0.95, 0.58, 0.36], [0.92, 0.62, 0.48], [0.85, 0.34, 0.30], [0.72, 0.48, 0.44]], np.float32
)
_RESIDUE = np.array([0.78, 0.62, 0.26], np.float32)


def phantom_images(
    count: int, seed: int, size: tuple[int, int] = SIZE, kind: str = "polyp"
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]:
    """Yield `count` images (H, W, 3) with masks (H, W) of 0 and 255, and their names.

    Image `i` depends on `seed`, `i`, `size` and `kind` alone, so a longer series begins with the shorter one.

    Raises:
        UserError: There is no such kind; `SCENES` has them.
    """
    draw = SCENES[chosen("phantom", {"name": kind}, SCENES)]
    for index in range(count):
        image, mask = draw(np.random.default_rng((seed, index)), *size)
        yield image, mask, drawn_name(kind, index)


def write_phantom(folder: Path | str, count: int, seed: int, size: tuple[int, int] = SIZE, kind: str = "polyp") -> None:
    """Write `images/` and `masks/` as PNG below `folder`, ready to be a `root`."""
    for image, mask, name in phantom_images(count, seed, size, kind):
        for part, array in (("images", image[..., ::-1]), ("masks", mask)):
            write_bytes_atomic(Path(folder, part, f"{name}.png"), cv2.imencode(".png", array)[1].tobytes())


def _scene(rng: np.random.Generator, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    noise = Noise(rng, height, width)
    draw = rng.uniform
    y, x = (np.mgrid[:height, :width].astype(np.float32) + 0.5) / height
    x, y = x - 0.5 * width / height, y - 0.5

    # The wall: folds are rings about the lumen, which lies in the picture or beyond its edge.
    away, angle = draw(0, 0.3) if draw() < 0.55 else draw(0.6, 1.1), draw(0, math.tau)
    lumen = away * math.cos(angle), away * math.sin(angle)
    across, down = x - lumen[0], y - lumen[1]
    radius, theta = cv2.cartToPolar(across, down)
    radius *= 1 + 0.14 * np.cos(3 * theta + draw(0, 6.3)) + 0.08 * np.cos(2 * theta + draw(0, 6.3))
    phase = draw(4, 7) * np.log(radius + 0.08) + draw(0.2, 0.6) * noise(2)
    crest = np.exp(draw(2, 8) * (np.cos(phase) - 1))
    fold = np.clip(0.8 + 0.4 * noise(2), 0, 1.3) * draw(0.3, 1.3)
    relief = 0.06 * fold * crest * np.minimum(radius * 3, 1) + draw(0.01, 0.04) * noise(2) + 0.004 * noise(7)
    shade = 1 - 0.6 * np.minimum(fold, 1) * np.exp(
        4 * (np.cos(phase + 1.1) - 1)
    )  # each fold keeps the light from what lies behind

    colour = rng.dirichlet(np.full(len(_MUCOSA), 0.6)).astype(np.float32) @ _MUCOSA
    pale = 0.1 * noise(2) + 0.05 * noise(6)  # the wall is redder here and paler there, never of another hue
    albedo = colour * cv2.merge([1 + 0.2 * pale, 1 + pale, 1 + pale + 0.02 * noise(2)])
    vessels = np.exp(-((noise(6) / 0.06) ** 2)) + 0.6 * np.exp(-((noise(11) / 0.08) ** 2))
    vessels *= draw(0, 0.9) * np.clip(noise(3), 0, 1)
    grain = 0.0005 * noise(40)

    mask = np.zeros((height, width), bool)
    for _ in range(int(rng.choice(4, p=[0.1, 0.6, 0.2, 0.1]))):
        for _ in range(20):  # a place on the wall that is in view
            place = draw(-0.4, 0.4) * width / height, draw(-0.4, 0.4)
            depth = math.hypot(place[0] - lumen[0], place[1] - lumen[1])
            if depth > 0.2:
                break
        polyp = _polyp(rng, noise, x - place[0], y - place[1], min(1.0, 0.5 + depth))
        soft = np.clip(polyp.inside * 8, 0, 1)  # 1 well inside, 0 outside
        relief = relief * (1 - 0.7 * soft) + polyp.bump
        albedo *= 1 + soft[..., None] * polyp.tint
        vessels, grain = vessels * (1 - 0.9 * soft), grain * (1 - soft) + polyp.texture * soft
        shade = np.where(polyp.inside > 0, 1 - 0.5 * (1 - shade), shade) * polyp.shadow
        mask |= polyp.inside > 0

    residue = np.clip(noise(3) + 0.5 * noise(8) + 0.2 * noise(20) - draw(1.6, 4), 0, 1)[..., None] * 0.7
    albedo *= 1 - vessels[..., None] * np.array([0.2, 0.5, 0.4], np.float32)
    albedo = albedo * (1 - residue) + _RESIDUE * residue

    # Light from the tip of the endoscope: diffuse, fading into the lumen, and mirrored by the wet wall.
    slope_y, slope_x = np.gradient(relief + grain, 1 / height)
    lamp = draw(-0.4, 0.4), draw(-0.4, 0.4)
    light_x, light_y = lamp[0] - 0.6 * across, lamp[1] - 0.6 * down
    facing = (1 - slope_x * light_x - slope_y * light_y) / np.sqrt(
        (1 + slope_x**2 + slope_y**2) * (1 + light_x**2 + light_y**2)
    )
    fade = (radius / (radius + draw(0.06, 0.16))) ** draw(1.2, 2.2)
    spot = draw(1.5, 2.1) - draw(0.5, 1.6) * ((x - lamp[0]) ** 2 + (y - lamp[1]) ** 2)
    light = np.clip(facing, 0.1, 1) ** 1.5 * fade * np.maximum(spot, 0.2) * shade
    # Tissue lets red light through and around: shadows turn red before they turn black.
    image = albedo * cv2.merge([light**0.85, light**1.15, light**1.25])
    image = image / (1 + 0.35 * image) * 1.2  # a camera's highlights roll off
    wet = facing + 0.03 * noise(24) + 0.015 * noise(9)
    glint = np.clip((wet - draw(1.02, 1.09)) * 40, 0, 1) * np.clip(light * 1.5, 0, 1)
    image += glint[..., None] * (1.05 - image)

    # The instrument: blur, black corners, sensor noise.
    image = np.asarray(cv2.GaussianBlur(image, (0, 0), height * draw(0.003, 0.006)), np.float32)
    edge = draw(0.80, 1.0) * (0.5 + 0.5 * width / height)
    window = np.clip((edge - np.abs(x) - np.abs(y)) * 80, 0, 1)
    image *= (window * (1 - 0.4 * (x**2 + y**2)))[..., None]
    image = image * 255 + draw(1, 4) * rng.standard_normal(image.shape, np.float32) + 4
    return np.clip(image, 0, 255).astype(np.uint8), (mask & (window > 0.5)).astype(np.uint8) * 255


class _Polyp(NamedTuple):
    """One polyp: how deep inside its outline a pixel lies (below 0 outside), height, texture, shadow; and its tint."""

    inside: Field
    bump: Field
    texture: Field
    shadow: Field
    tint: Field


_KINDS = {  # share, height and shadow of each kind, after the Paris classification: Is, IIa, Is lobed, Ip
    "dome": (0.4, 0.50, 0.45),
    "flat": (0.2, 0.16, 0.12),
    "lobed": (0.25, 0.50, 0.45),
    "stalked": (0.15, 0.75, 0.65),
}


def _polyp(rng: np.random.Generator, noise: Noise, x: Field, y: Field, near: float) -> _Polyp:
    """One polyp about the origin of `x`, `y`, smaller where the wall is farther away."""
    kind = str(rng.choice(list(_KINDS), p=[share for share, _, _ in _KINDS.values()]))
    _, tall, dark = _KINDS[kind]
    draw = rng.uniform
    size = near * draw(0.08, 0.22) * (1.3 if kind == "flat" else 1)
    turn, stretch = draw(0, math.pi), draw(1, 1.6)
    along = (math.cos(turn) * x + math.sin(turn) * y) / stretch
    aside = math.cos(turn) * y - math.sin(turn) * x
    _, theta = cv2.cartToPolar(along, aside)
    outline = np.full(theta.shape, size, np.float32)
    for wave in (2, 3, 4, 5):
        outline += float(rng.normal(0, 0.14 / wave)) * size * np.cos(wave * theta + draw(0, 6.3))
    reach = np.hypot(along, aside) / outline
    top = np.clip(1 - reach**2, 0, 1) ** 0.8
    if kind == "flat":
        top = np.clip((1 - reach) * 3, 0, 1) * (1 + 0.3 * noise(9))
    if kind == "lobed":
        step = draw(3, 5) / size
        top *= 1 + 0.3 * np.cos(along * step + draw(0, 6.3)) * np.cos(aside * step + draw(0, 6.3))
    # The shadow falls to one side, from a body shifted against the light.
    drop = draw(-0.5, 0.5) * size, draw(-0.5, 0.5) * size
    behind = np.hypot(along - drop[0], aside - drop[1]) / outline
    shadow = np.where(reach < 1, 1, 1 - dark * np.exp(-5 * np.maximum(behind - 0.9, 0)))
    tint = rng.normal(0, 0.04, 3) + rng.choice([-1, 1]) * draw(0.02, 0.16) * np.array([0.2, 1.0, 0.9])
    texture = draw(0.0005, 0.003) * noise(int(rng.integers(18, 34)))
    return _Polyp(*(np.asarray(f, np.float32) for f in (1 - reach, tall * size * top, texture, shadow, tint)))


SCENES: dict[str, Callable[[np.random.Generator, int, int], tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {
    "polyp": _scene,
    "skin": skin_scene,
    "vessels": vessels_scene,
    "nuclei": nuclei_scene,
}
"""What draws a picture of each kind and its mask, from a generator, height and width."""
