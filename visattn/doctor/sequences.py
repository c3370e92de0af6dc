"""Runs of video frames among numbered files: neighbours look alike, images far apart do not.

The likeness of two images is the correlation of their fine details (see `twins`) plus the overlap of their colour
histograms, at most 2. A place between two frames is a cut where no frame of the `WINDOW` before looks like one of those
after it: a single blurred frame is no cut. In the 103 frames of CVC-ClinicDB that the limits were set on, the five
videos part below 1.43, and within them every place lies above 1.46.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from visattn.doctor.twins import details

WINDOW = 8
CUT = 1.45
_FEWEST = 10  # frames without which nothing is said about a series
_ALIKE = 1.45  # what neighbours reach in the median
_MORE_ALIKE = 0.2  # by how much neighbours exceed frames that stand far apart, in the median

Likeness = NDArray[np.float32]


def find_sequences(stems: Sequence[str], thumbnails: NDArray[np.uint8], colours: NDArray[np.uint8]) -> list[list[int]]:
    """Videos of two frames or more, each as the indices of its frames in order; empty where there are none.

    Args:
        stems: File names without suffix.
        thumbnails: (N, 32, 32), see `twins.thumbnail`.
        colours: (N, 256), histograms that sum to about 255.
    """
    found: list[list[int]] = []
    for series in _numbered(stems):
        if len(series) < _FEWEST:
            continue
        fine = details(thumbnails[series])
        tints: NDArray[np.float32] = colours[series].astype(np.float32) / np.float32(255)
        near = [_likeness(fine, tints, step) for step in range(1, WINDOW + 1)]
        far = _likeness(fine, tints, len(series) // 2)
        if np.median(near[0]) >= _ALIKE and np.median(near[0]) - np.median(far) >= _MORE_ALIKE:
            found += _cut(series, near)
    return sorted(found)


def _numbered(stems: Sequence[str]) -> list[list[int]]:
    """Files whose names differ by their last number alone, in the order of that number."""
    series: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for index, stem in enumerate(stems):
        match = re.fullmatch(r"(.*?)(\d{1,18})(\D*)", stem, re.DOTALL)
        if match:
            series[match[1], match[3]].append((int(match[2]), index))
    return [[index for _, index in sorted(members)] for members in series.values()]


def _likeness(fine: NDArray[np.float32], tints: NDArray[np.float32], step: int) -> Likeness:
    """Of each frame with that `step` later, (N - step,)."""
    details_agree = (fine[:-step] * fine[step:]).sum(axis=1)
    return np.asarray(details_agree + np.minimum(tints[:-step], tints[step:]).sum(axis=1), np.float32)


def _cut(series: Sequence[int], near: Sequence[Likeness]) -> list[list[int]]:
    """Cut where the likeness across is low, and give a frame that stands alone to the neighbour it is more like."""
    count = len(series)
    across = np.full(count, -np.inf, np.float32)  # entry p: the best likeness of a frame before p and one from p on
    for step, likeness in enumerate(near, 1):
        for shift in range(step):
            places = across[1 + shift : 1 + shift + len(likeness)]
            np.maximum(places, likeness, out=places)
    cuts = [0, *(p for p in range(1, count) if across[p] < CUT), count]
    runs = [list(range(a, b)) for a, b in pairwise(cuts)]
    whole: list[list[int]] = []
    for position, run in enumerate(runs):
        if len(run) == 1 and whole and (position == len(runs) - 1 or _leans_back(run[0], near)):
            whole[-1] += run
        elif len(run) == 1 and position + 1 < len(runs):
            runs[position + 1][:0] = run
        else:
            whole.append(run)
    return [[series[p] for p in run] for run in whole if len(run) > 1]


def _leans_back(p: int, near: Sequence[Likeness]) -> bool:
    """Whether frame `p` is more like those before it than like those after it, in the median."""
    before = [likeness[p - step] for step, likeness in enumerate(near, 1) if p >= step]
    after = [likeness[p] for likeness in near if p < len(likeness)]
    return bool(before) and (not after or bool(np.median(before) >= np.median(after)))
