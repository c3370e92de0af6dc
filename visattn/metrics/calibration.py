"""Whether a probability means what it says: of the pixels given 80 %, are 80 % foreground?

For each foreground class, the pixels of all cases are sorted into M = 10 equal bins of the probability p of that class:
[0, 0.1), [0.1, 0.2), ..., [0.9, 1]. A bin b of n_b pixels has the mean probability conf(b) and the share freq(b) of
pixels that truly belong to the class. The expected calibration error is

    ECE = sum_b n_b / N * |freq(b) - conf(b)|,    N = sum_b n_b,

of Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017 (https://arxiv.org/abs/1706.04599,
equation 3). Deviations: the paper bins the probability of the class that was chosen, here every class has bins of its
own, since a pixel of background that is given to a lesion with 30 % matters as well; and its bins hold their upper end,
ours the lower one, so that the threshold 0.5 divides two bins. Pixels whose truth is `IGNORE` are left out.

Most pixels of most images are background that is easily told, which makes the ECE small: the bins in the middle say
more.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visattn.metrics.cases import _IGNORE

if TYPE_CHECKING:
    from visattn.labels import Labels  # imports torch, which counting does not need

BINS = 10

Sums = NDArray[np.float64]


def count_bins(probabilities: NDArray[np.floating[Any]], truth: NDArray[np.integer[Any]], labels: "Labels") -> Sums:
    """Sort the pixels of one case into bins.

    Args:
        probabilities: (channels, H, W) in 0..1, the channels of `labels`.
        truth: Class indices (H, W), `IGNORE` where a pixel is left out.
        labels: The label map.

    Returns:
        (foreground classes, `BINS`, 3): the number of pixels, the sum of their probabilities, and how many of them
        belong to the class. Sums of cases are sums of these arrays.

    Raises:
        ValueError: Shapes do not fit, or a probability is not in 0..1.
    """
    if probabilities.shape != (labels.channels, *truth.shape):
        raise ValueError(f"probabilities have shape {probabilities.shape}, expected {(labels.channels, *truth.shape)}")
    valid = truth != _IGNORE
    first = labels.channels - len(labels.foreground)  # the background has a channel of its own under softmax
    true = labels.onehot(truth)
    sums = np.empty((len(labels.foreground), BINS, 3))
    for index, channel in enumerate(range(first, labels.channels)):
        probability = probabilities[channel][valid]
        if probability.size and not (probability.min() >= 0 and probability.max() <= 1):  # NaN fails too
            raise ValueError(f"a probability of '{labels.foreground[index]}' is not in 0..1")
        sums[index] = sum_bins(probability, true[channel][valid])
    return sums


def bins_of(probability: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
    """The bin of each probability."""
    return np.minimum((probability * BINS).astype(np.int64), BINS - 1)


def sum_bins(probability: NDArray[np.floating[Any]], true: NDArray[np.bool_]) -> Sums:
    """Sort probabilities (N,) of what is truly so (N,) or not into bins: (`BINS`, 3), as `count_bins` has it."""
    bins = bins_of(probability)
    counts = [np.bincount(bins, minlength=BINS), np.bincount(bins, probability, minlength=BINS)]  # added up in float64
    return np.stack([*counts, np.bincount(bins[true], minlength=BINS)], axis=1).astype(np.float64)


def describe_calibration(sums: Sums, labels: "Labels") -> dict[str, dict[str, Any]]:
    """Sums over cases as `summary.json` holds them.

    Returns:
        For each foreground class `confidence`, `frequency` (None in an empty bin) and `count`, each of `BINS` values,
        and `ece`, None if no pixel was counted.
    """
    return describe_bins(dict(zip(labels.foreground, sums, strict=True)))


def describe_bins(sums: Mapping[str, Sums]) -> dict[str, dict[str, Any]]:
    """Bins (`BINS`, 3) by name as `describe_calibration` gives them."""
    result: dict[str, dict[str, Any]] = {}
    for name, of_class in sums.items():
        count, confidence, hits = of_class.T
        total = float(count.sum())
        filled = count > 0
        result[name] = {
            "confidence": [float(c / n) if n else None for c, n in zip(confidence, count, strict=True)],
            "frequency": [float(h / n) if n else None for h, n in zip(hits, count, strict=True)],
            "count": [int(n) for n in count],
            "ece": float(np.abs(hits - confidence)[filled].sum() / total) if total else None,
        }
    return result
