"""One look at the two files of every case, in threads; little is kept of each, so that large sets fit in memory."""

import hashlib
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from visattn.data.cases import Case, embedded
from visattn.data.images import resize_mask
from visattn.data.phantoms import PHANTOM, kind_of
from visattn.doctor.twins import SIDE, thumbnail
from visattn.errors import UserError
from visattn.labels import IGNORE, Labels
from visattn.progress import Bar
from visattn.survey import Facts, look_at_image, look_at_mask

_AHEAD = 64  # cases in flight: the pool is not handed sixty thousand at once
_DARK = 64  # grey levels that two tones must be apart for an image to look like a mask


@dataclass(frozen=True, eq=False)
class ImagePrint:
    """What is kept of the pixels of an image.

    Args:
        low: The smallest value of any channel.
        high: The largest.
        bright: The value that 99 of 100 grey pixels do not exceed.
        thumbnail: (32, 32), see `twins.thumbnail`.
        colours: Histogram over hue, saturation and value, 256 bins that sum to about 255.
        two_toned: Share of the pixels near the darkest or the brightest grey value; 0 where these are close.
        like_mask: Overlap (intersection over union) of its brighter half of tones with that of the mask.
    """

    low: int
    high: int
    bright: int
    thumbnail: NDArray[np.uint8]
    colours: NDArray[np.uint8]
    two_toned: float
    like_mask: float


@dataclass(frozen=True, eq=False)
class MaskPrint:
    """What is kept of a mask.

    Args:
        values: Its values, ascending.
        counts: How many pixels have each.
        border: How many pixels of the border have each.
        digest: Of size and values, so that equal masks in different files are equal.
        lost: Class indices that are lost when the mask is resized for training; empty where labels are not known.
    """

    values: NDArray[np.uint16]
    counts: NDArray[np.uint32]
    border: NDArray[np.uint32]
    digest: bytes
    lost: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Seen:
    """A case and what was learned from its files.

    Args:
        case: The case.
        image: Facts of the image.
        mask: Facts of the mask; its values stand in `content`.
        digest: Of the bytes of the image file; empty where it cannot be read.
        mask_digest: Of the bytes of the mask file.
        look: Of the pixels of the image, or None where they cannot be read.
        content: Of the mask, or None.
        complaints: Warnings of the decoder: the file, and what it said.
    """

    case: Case
    image: Facts
    mask: Facts
    digest: bytes
    mask_digest: bytes
    look: ImagePrint | None
    content: MaskPrint | None
    complaints: tuple[tuple[Path, str], ...]


def read_cases(cases: Sequence[Case], labels: Labels | None, size: tuple[int, int] | None) -> list[Seen]:
    """Look at every case once.

    Args:
        cases: The cases.
        labels: The label map, where it is known beforehand.
        size: Height and width of training, where known.
    """
    for kind in sorted({kind_of(case.name) for case in cases if case.root == PHANTOM}):
        embedded(kind)  # once, before the threads ask for it
    return look_at_all(cases, lambda case, heard: _look(case, labels, size, heard))


def look_at_all(cases: Sequence[Case], look: "Callable[[Case, Heard], Seen]") -> list[Seen]:
    """Look at every case once, in threads.

    Args:
        cases: The cases.
        look: What is learned from one; it says in `Heard.path` which file it reads.
    """
    seen: list[Seen] = []
    threads = min(8, os.cpu_count() or 1)
    with Bar("examining", len(cases)) as bar, _complaints() as heard, ThreadPoolExecutor(threads) as pool:

        def hear(case: Case) -> Seen:
            heard.said = []
            return replace(look(case, heard), complaints=tuple(heard.said))

        waiting: deque[Future[Seen]] = deque()
        todo: Iterator[Case] = iter(cases)
        while True:
            waiting.extend(pool.submit(hear, case) for case in islice(todo, _AHEAD - len(waiting)))
            if not waiting:
                return seen
            seen.append(waiting.popleft().result())
            bar.advance()


class Heard(threading.local):
    """The warnings that this thread heard, and the file that it reads."""

    path: Path = Path()
    said: list[tuple[Path, str]] = []  # noqa: RUF012 - replaced in each thread before it is used


@contextmanager
def _complaints() -> Iterator[Heard]:
    """Collect Python warnings by file. `catch_warnings` alone belongs to the process, not to a thread."""
    heard = Heard()

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        text = (heard.path, str(message).split("\n")[0][:200])
        if text not in heard.said:
            heard.said.append(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield heard


def _look(case: Case, labels: Labels | None, size: tuple[int, int] | None, heard: Heard) -> Seen:
    if case.root == PHANTOM:
        pixels, grey = embedded(kind_of(case.name))[case.name]
        image: NDArray[np.uint8] | None = pixels
        mask: NDArray[np.int32] | None = grey.astype(np.int32)
        facts = Facts(case.image, pixels.shape[:2], "RGB", "PNG", colour=255)
        counted = zip(*np.unique(grey, return_counts=True), strict=True)
        values = tuple((int(value), int(count)) for value, count in counted)
        mask_facts = Facts(case.mask, grey.shape, "L", "PNG", values=values)
        digests = hashlib.sha256(pixels.tobytes()).digest(), hashlib.sha256(grey.tobytes()).digest()
    else:
        heard.path = case.image
        facts, image = look_at_image(case.image)
        heard.path = case.mask
        mask_facts, mask = look_at_mask(case.mask)
        digests = digest_of(case.image), digest_of(case.mask)
    content = None if mask is None else _mask_print(mask, mask_facts.values, labels, size)
    look = None if image is None else image_print(image, mask)
    return Seen(case, facts, replace(mask_facts, values=()), *digests, look, content, ())


def digest_of(path: Path) -> bytes:
    """SHA-256 of a file; empty where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:  # the readers have said why
        return b""


def image_print(image: NDArray[np.uint8], mask: NDArray[np.int32] | None) -> ImagePrint:
    """What is kept of an image (H, W, 3), looked at beside its mask where it has one."""
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    tones = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel().astype(np.int64)
    there = np.flatnonzero(tones)
    low, high = int(there[0]), int(there[-1])
    near = tones[low : low + 17].sum() + tones[max(high - 16, low + 17) : high + 1].sum()
    small = thumbnail(grey)
    like = 0.0
    if mask is not None and mask.shape == grey.shape:
        bright = grey > (low + high) / 2
        drawn = mask > (int(mask.min()) + int(mask.max())) / 2
        like = float((bright & drawn).sum() / max(1, int((bright | drawn).sum())))
    return ImagePrint(
        int(image.min()),
        int(image.max()),
        int(np.searchsorted(np.cumsum(tones), 0.99 * grey.size)),
        small,
        colours(image),
        float(near / grey.size) if high - low > _DARK else 0.0,
        like,
    )


def colours(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A histogram (256,) over hue, saturation and value of an image (H, W, 3), for `find_sequences`."""
    small = cv2.resize(image, (2 * SIDE, 2 * SIDE), interpolation=cv2.INTER_AREA)
    hsv = cv2.cvtColor(small, cv2.COLOR_RGB2HSV)
    histogram = cv2.calcHist([hsv], [0, 1, 2], None, [16, 4, 4], [0, 180, 0, 256, 0, 256]).ravel()
    return np.asarray(histogram * (255 / histogram.sum()) + 0.5).astype(np.uint8)


def _mask_print(
    mask: NDArray[np.int32],
    counted: tuple[tuple[int, int], ...],
    labels: Labels | None,
    size: tuple[int, int] | None,
) -> MaskPrint | None:
    """None where the values are no labels at all, which the facts do not refuse: beyond 16 bits."""
    values, counts = np.array(counted, np.int64).T
    if values[0] < 0 or values[-1] > 65535:
        return None
    edge = np.concatenate([mask[0], mask[-1], mask[1:-1, 0], mask[1:-1, -1]])
    border = np.bincount(edge, minlength=int(values[-1]) + 1)
    digest = hashlib.sha256(repr(mask.shape).encode() + mask.astype(np.uint16).tobytes()).digest()
    lost: tuple[int, ...] = ()
    if labels is not None and size is not None:
        try:
            indices = labels.encode(mask, "")
        except UserError:  # told from `values`
            indices = np.zeros((1, 1), np.uint8)
        before, after = set(np.unique(indices).tolist()), set(np.unique(resize_mask(indices, size)).tolist())
        lost = tuple(sorted(before - after - {0, IGNORE}))
    return MaskPrint(values.astype(np.uint16), counts.astype(np.uint32), border[values].astype(np.uint32), digest, lost)
