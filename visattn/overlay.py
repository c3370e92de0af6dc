"""Pictures that show a mask on its image: outlines, so that the tissue under the mask stays visible.

How an outline is read does not rest on colour alone. The truth is a solid line, the prediction a dashed one, and both
lie on a dark casing: where they coincide, both can be seen; a reader who sees no red or green tells them apart by the
dashes; and neither is lost on bright or dark ground. A legend stands below the image, never on it.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visattn.files import write_bytes_atomic
from visattn.labels import IGNORE, Labels

Colour = tuple[int, int, int]

TRUTH: Colour = (255, 255, 255)
PREDICTION: Colour = (0, 229, 255)  # cyan: far from mucosa and skin in hue, and from white in every colour-vision type
# For several classes the colour names the class. Light shades of Okabe and Ito's palette, doi:10.1038/nmeth.1618
CLASSES: tuple[Colour, ...] = (
    (86, 204, 255),
    (255, 190, 40),
    (240, 130, 220),
    (60, 220, 150),
    (255, 245, 90),
    (255, 120, 60),
    (120, 150, 255),
)
_CASING: Colour = (20, 20, 24)
_PAPER: Colour = (22, 24, 29)
_MIN_WIDTH = 320  # pixels that a legend needs; narrower images are enlarged by a whole factor


def draw_overlay(
    image: NDArray[np.uint8],
    prediction: NDArray[np.uint8],
    labels: Labels,
    truth: NDArray[np.uint8] | None = None,
    note: str = "",
    across: int = 1,
) -> NDArray[np.uint8]:
    """Draw the outlines of the prediction, and of the truth where there is one, over an image.

    Args:
        image: (H, W, 1) or (H, W, 3).
        prediction: Class indices (H, W).
        labels: What the indices mean; one outline is drawn for each foreground class or region.
        truth: Class indices (H, W). Ignored pixels are darkened.
        note: A few words for the right end of the legend, as a score.
        across: How many pictures stand side by side in the image; lines and letters are as wide as one of them asks.

    Returns:
        (H + legend, W, 3), both sides times a whole factor where the image is narrower than 320 pixels.
    """
    factor = -(-_MIN_WIDTH // image.shape[1])
    canvas = _enlarged(np.broadcast_to(image, (*image.shape[:2], 3)), factor).copy()
    # An outline as wide as 1/300 of the image is some two pixels wide in a report.
    thickness = max(2, round(max(canvas.shape[:2]) / 300 / across))
    legend: list[tuple[Colour, bool, str]] = []

    ignored = truth is not None and bool((truth == IGNORE).any())
    if truth is not None and ignored:
        canvas[_enlarged(truth == IGNORE, factor)] //= 3
    roles = [(truth, False, "truth")] if truth is not None else []
    roles.append((prediction, True, "prediction"))
    several = len(labels.foreground) > 1
    for indices, dashed, role in roles:
        assert indices is not None
        for number, mask in enumerate(foreground_masks(indices, labels)):
            colour = CLASSES[number % len(CLASSES)] if several else (PREDICTION if dashed else TRUTH)
            _outline(canvas, _enlarged(mask, factor), colour, thickness, dashed)
        if several:
            legend.append(((255, 255, 255), dashed, role))
    if several:
        legend += [(CLASSES[i % len(CLASSES)], False, name) for i, name in enumerate(labels.foreground)]
    else:
        legend = [(PREDICTION if dashed else TRUTH, dashed, role) for _, dashed, role in roles]
    words = f"{note}   dark: ignored" if ignored else note
    return np.concatenate([canvas, _legend(canvas.shape[1], legend, words, thickness, across)])


def foreground_masks(indices: NDArray[np.uint8], labels: Labels) -> NDArray[np.bool_]:
    """Class indices (H, W) to one mask for each of `labels.foreground`, (foreground, H, W)."""
    maps: NDArray[np.bool_] = labels.onehot(indices)
    return maps[1:] if labels.activation == "softmax" else maps


def write_png(path: Path | str, array: NDArray[Any]) -> None:
    """Write (H, W) of 8 or 16 bits or (H, W, 3) RGB as PNG, whole or not at all."""
    write_bytes_atomic(path, encode_png(array))


def encode_png(array: NDArray[Any]) -> bytes:
    """The bytes of a PNG: the same for the same pixels."""
    if array.ndim == 3:
        array = array[..., ::-1]  # OpenCV takes BGR
    done, data = cv2.imencode(".png", np.ascontiguousarray(array))
    if not done:
        raise ValueError(f"no PNG of {array.shape} {array.dtype}")
    return bytes(data)


def safe_name(name: str, limit: int = 100) -> str:
    """`name` as a part of a file name: what a file system or a page could take amiss becomes `_`.

    Letters and digits of any script stay. `limit` is in bytes, since that is what file systems count.
    """
    text = unicodedata.normalize("NFC", name)
    text = "".join(c if c.isalnum() or c in "-_." else "_" for c in text)
    return text.encode()[:limit].decode("utf-8", "ignore").strip(".") or "_"


def _enlarged(array: NDArray[Any], factor: int) -> NDArray[Any]:
    return array if factor == 1 else array.repeat(factor, axis=0).repeat(factor, axis=1)


def _outline(canvas: NDArray[Any], mask: NDArray[np.bool_], colour: Colour, thickness: int, dashed: bool) -> None:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        lines = _dashes(contour[:, 0], thickness) if dashed else [contour[:, 0]]
        for width, shade in ((thickness + 2 * max(1, thickness // 2), _CASING), (thickness, colour)):
            cv2.polylines(canvas, lines, not dashed, shade, width, cv2.LINE_AA)


def _dashes(points: NDArray[Any], thickness: int) -> list[NDArray[Any]]:
    """Cut the closed line through `points` (N, 2) into dashes whose number is whole, so that the ends meet."""
    closed = np.concatenate([points, points[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    period = 9.0 * thickness + 3
    count = max(1, round(along[-1] / period))
    if count == 1:
        return [closed]
    phase = along / along[-1] * count
    drawn = phase % 1 < 0.6
    dash = np.floor(phase)
    return [closed[drawn & (dash == number)] for number in range(count) if (drawn & (dash == number)).any()]


def _legend(
    width: int, items: Sequence[tuple[Colour, bool, str]], note: str, thickness: int, across: int = 1
) -> NDArray[np.uint8]:
    """A strip of `width` with a line sample and a name for each item, in as many rows as they need."""
    # One of several pictures side by side is seen smaller than one alone.
    size = int(min(max(width / (34 if across == 1 else 25 * across), 12), 44))
    face = font(size)
    pad, sample = size // 2, 3 * size
    row = size + pad
    entries = [(colour, dashed, _printable(name)) for colour, dashed, name in items]
    x, y, placed = pad, pad, []
    for colour, dashed, name in entries:
        need = sample + pad + int(face.getlength(name)) + 2 * pad
        if x > pad and x + need > width:
            x, y = pad, y + row
        placed.append((x, y, colour, dashed, name))
        x += need
    note = _printable(note)
    note_width = int(face.getlength(note))
    if note and x + note_width + pad > width:
        y += row
    strip = Image.new("RGB", (width, y + row + pad // 2), _PAPER)
    draw = ImageDraw.Draw(strip)
    for left, top, colour, dashed, name in placed:
        middle = top + size // 2 + 1
        stops = np.linspace(left, left + sample, 6)
        for start, end in (
            [(stops[0], stops[1]), (stops[2], stops[3]), (stops[4], stops[5])] if dashed else [(stops[0], stops[5])]
        ):
            draw.line([(start, middle), (end, middle)], colour, thickness)
        draw.text((left + sample + pad, middle), name, (240, 240, 240), face, anchor="lm")
    if note:
        draw.text((max(pad, width - pad - note_width), y + size // 2 + 1), note, (240, 240, 240), face, anchor="lm")
    return np.asarray(strip)


@lru_cache(maxsize=8)
def font(size: int) -> Any:
    """A font of `size` pixels for Pillow."""
    # Pillow's own font knows ASCII alone. matplotlib, which we depend on, brings one with Latin, Greek and Cyrillic;
    # it is found without the cost of importing matplotlib.
    found = find_spec("matplotlib")
    folders = (found.submodule_search_locations if found else None) or []
    for folder in folders:
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
