"""Images that are the same, or nearly: found by a hash of 63 bits, confirmed by their fine details.

An image becomes a grey thumbnail of 32 x 32, free of brightness and contrast. Its hash has one bit for each of the 63
lowest frequencies (discrete cosine transform): whether it lies above the median of the data set, so that what all
images share (the black frame of an endoscope, the disc of a fundus) decides no bit. Two images are candidates where at
most `RADIUS` bits differ; in a small set all pairs are. They are twins where the thumbnails correlate by
`ALIKE_COARSE`, and their fine details, what is left without the low frequencies, by `ALIKE`.

Measured on 477 real images of four data sets: the same image after JPEG of quality 15, at a quarter or twice the size,
blurred or made grey differs by at most 8 bits (median 0 to 2) and correlates by more than 0.96 (median 0.99 and more);
two different images that differ by few bits are neighbouring frames of a video, and correlate by less than 0.975.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn

SIDE = 32
RADIUS = 6
RADIUS_TURNED = 3  # a mirrored copy is mirrored exactly; the smaller radius makes seven more searches cheap
ALIKE = 0.98
ALIKE_COARSE = 0.95
SMALL = 1024
"""Up to so many images all pairs are compared: in a small set, twins would sit on both sides of their own median."""

_BITS = 63
_FLAT = 1e-6
_ROUNDING = 1e-3
_CHUNK = 1024
_ENOUGH = 32  # twins of one image that are looked for: of a still video, each frame is tied to the next ones

Hashes = NDArray[np.uint64]
Number = TypeVar("Number", np.float16, np.float32)
Pairs = tuple[NDArray[np.int64], NDArray[np.int64]]


class Twins(NamedTuple):
    """Two images that are nearly the same.

    Args:
        first: Index of the one.
        second: Index of the other, larger than `first`.
        turned: Whether one is a mirrored or turned copy of the other.
        alike: Correlation of their fine details, up to 1.
    """

    first: int
    second: int
    turned: bool
    alike: float


def thumbnail(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A grey image (H, W) as (32, 32), stretched to 0..255."""
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low, high = float(small.min()), float(small.max())
    return np.asarray((small - low) * (255 / max(high - low, 1)) + 0.5).astype(np.uint8)


def find_twins(thumbnails: NDArray[np.uint8], turned: bool = True) -> list[Twins]:
    """Pairs of nearly equal images, each once; of many equal ones, pairs that tie them together.

    Args:
        thumbnails: (N, 32, 32) of `thumbnail`.
        turned: Look for mirrored and turned copies too.
    """
    found: dict[tuple[int, int], Twins] = {}
    firsts: dict[bytes, int] = {}
    for index, small in enumerate(thumbnails):
        if int(small.max()) > int(small.min()):  # a constant image is like any other
            same = firsts.setdefault(small.tobytes(), index)
            if same != index:
                found[same, index] = Twins(same, index, False, 1.0)
    unique: NDArray[np.int64] = np.array(sorted(firsts.values()), np.int64)
    if len(unique) < 2:
        return sorted(found.values())
    small = thumbnails[unique]
    fine = _details(small).reshape(small.shape)
    candidates = _every_pair(fine) if len(unique) <= SMALL else _near_hashes(small)
    for turn in range(8 if turned else 1):
        first, second = candidates(turn)
        for start in range(0, len(first), _CHUNK):
            a, b = first[start : start + _CHUNK], second[start : start + _CHUNK]
            alike = _products(fine[a], _turn(fine[b], turn))
            coarse = _products(_standard(small[a]), _turn(_standard(small[b]), turn))
            good = (alike >= ALIKE) & (coarse >= ALIKE_COARSE)
            rows = zip(unique[a[good]].tolist(), unique[b[good]].tolist(), alike[good].tolist(), strict=True)
            for i, j, value in rows:
                # Upright comes first: an image with a mirror plane is no mirrored copy.
                found.setdefault((i, j), Twins(i, j, turn > 0, value))
    return sorted(found.values())


def _every_pair(fine: NDArray[np.float16]) -> Callable[[int], Pairs]:
    """For a small set: all pairs whose details agree."""
    flat = fine.reshape(len(fine), -1).astype(np.float32)

    def candidates(turn: int) -> Pairs:
        alike = flat @ _turn(fine, turn).reshape(len(fine), -1).astype(np.float32).T
        first, second = np.nonzero(np.triu(alike >= ALIKE - _ROUNDING, 1))
        return first, second

    return candidates


def _near_hashes(small: NDArray[np.uint8]) -> Callable[[int], Pairs]:
    """For a large set: pairs whose hashes are near."""
    frequencies = _frequencies(small)
    middle = np.median(frequencies, axis=0)
    hashes = _hashes(frequencies, middle)

    def candidates(turn: int) -> Pairs:
        if turn == 0:
            return near_pairs(hashes)
        return near_pairs(hashes, _hashes(_turn_frequencies(frequencies, turn), middle), RADIUS_TURNED)

    return candidates


def near_pairs(hashes: Hashes, others: Hashes | None = None, radius: int = RADIUS) -> Pairs:
    """Pairs i < j with at most `radius` different bits between `hashes[i]` and `hashes[j]` (or `others[j]`).

    Two such hashes agree in at least one of radius + 1 bands of bits. Sorted by a band, the candidates for a hash lie
    in a row; all hashes are compared with the first of their row at once, then with the second, and so on. So memory
    grows with N, and the comparisons with N times the length of a row.
    """
    bands = radius + 1
    width = _BITS // bands
    count = np.uint64(len(hashes))
    targets = hashes if others is None else others
    found: list[NDArray[np.uint64]] = [np.empty(0, np.uint64)]
    for band in range(bands):
        shift, ones = np.uint64(band * width), np.uint64(2**width - 1)
        target_keys = (targets >> shift) & ones
        order = np.argsort(target_keys, kind="stable")
        sorted_keys, sorted_hashes = target_keys[order], targets[order]
        mine = np.arange(len(hashes))
        keys = (hashes >> shift) & ones
        end = np.searchsorted(sorted_keys, keys, side="right")
        if others is None:  # each pair once: only with those further down the row
            at = np.empty_like(mine)
            at[order] = mine + 1
        else:
            at = np.searchsorted(sorted_keys, keys, side="left")
        many = np.zeros(len(hashes), np.int64)
        while len(mine):
            alive = (at < end) & (many[mine] < _ENOUGH)
            mine, at, end = mine[alive], at[alive], end[alive]
            near = np.bitwise_count(hashes[mine] ^ sorted_hashes[at]) <= radius
            first, second = mine[near], order[at[near]]
            many[first] += 1
            if others is None:
                first, second = np.minimum(first, second), np.maximum(first, second)
            ordered = first < second
            found.append(first[ordered].astype(np.uint64) * count + second[ordered].astype(np.uint64))
            at = at + 1
    pairs = np.unique(np.concatenate(found))
    return (pairs // count).astype(np.int64), (pairs % count).astype(np.int64)


def details(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The fine details of thumbnails (N, 32, 32) as unit vectors (N, 1024); zero where there are none."""
    return _details(thumbnails).astype(np.float32)


def _standard(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean 0 and norm 1; all zero where an image is constant."""
    plain = thumbnails.astype(np.float32)
    plain -= plain.mean(axis=(1, 2), keepdims=True)
    norm = np.sqrt((plain * plain).sum(axis=(1, 2), keepdims=True))
    return np.asarray(np.divide(plain, norm, out=np.zeros_like(plain), where=norm > _FLAT))


def _frequencies(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The 8 x 8 lowest frequencies (N, 8, 8)."""
    parts = [
        dctn(_standard(thumbnails[i : i + _CHUNK]), axes=(1, 2), norm="ortho")[:, :8, :8].copy()
        for i in range(0, len(thumbnails), _CHUNK)
    ]
    return np.concatenate(parts)


def _hashes(frequencies: NDArray[np.float32], middle: NDArray[np.float32]) -> Hashes:
    bits = (frequencies > middle).reshape(len(frequencies), -1)[:, 1:]  # the first is the mean
    weights = np.left_shift(np.uint64(1), np.arange(bits.shape[1], dtype=np.uint64))
    return np.asarray((bits * weights).sum(axis=1, dtype=np.uint64))


def _turn(plain: NDArray[Number], turn: int) -> NDArray[Number]:
    """One of the eight ways to lay a square: bit 0 mirrors columns, bit 1 rows, bit 2 swaps the two before."""
    if turn & 4:
        plain = plain.transpose(0, 2, 1)
    return plain[:, :: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1]


def _turn_frequencies(frequencies: NDArray[np.float32], turn: int) -> NDArray[np.float32]:
    """The frequencies of the turned images: mirroring changes the sign of the odd ones."""
    signs = np.where(np.arange(8) % 2, -1, 1).astype(np.float32)
    if turn & 4:
        frequencies = frequencies.transpose(0, 2, 1)
    if turn & 2:
        frequencies = frequencies * signs[:, None]
    return frequencies * signs if turn & 1 else frequencies


def _details(thumbnails: NDArray[np.uint8]) -> NDArray[np.float16]:
    """(N, 1024) in half precision, which is what keeps large sets in memory."""
    result = np.zeros((len(thumbnails), SIDE * SIDE), np.float16)
    for start in range(0, len(thumbnails), _CHUNK):
        plain = _standard(thumbnails[start : start + _CHUNK])
        fine = np.stack([image - cv2.GaussianBlur(image, (0, 0), 2) for image in plain]).reshape(len(plain), -1)
        fine -= fine.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(fine, axis=1, keepdims=True)
        result[start : start + _CHUNK] = np.divide(fine, norm, out=np.zeros_like(fine), where=norm > _FLAT)
    return result


def _products(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray((first.astype(np.float32) * second.astype(np.float32)).sum(axis=(1, 2)))


def gather(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Sets of indices that are connected by `pairs`, each sorted, in the order of their first."""
    parent: dict[int, int] = {}

    def root(index: int) -> int:
        parent.setdefault(index, index)
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    sets: dict[int, list[int]] = {}
    for index in sorted(parent):
        sets.setdefault(root(index), []).append(index)
    return list(sets.values())
