"""Which class is taken for which: pixels counted by truth and prediction.

One class index per pixel gives one matrix over all classes, the background included: rows are the truth, columns the
prediction. Regions overlap, so a pixel belongs to several of them or to none, and each region has a matrix of its own:
[[TN, FP], [FN, TP]]. Pixels whose truth is `IGNORE` are in no matrix.

Counts add up over cases: the sum is that of all pixels together, so large images weigh more than small ones, unlike in
the means of `cases.csv`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visattn.metrics.cases import _IGNORE
from visattn.metrics.surface import bounding_box

if TYPE_CHECKING:
    from visattn.labels import Labels  # imports torch, which counting does not need

Counts = NDArray[np.int64]


def count_confusion(prediction: NDArray[np.integer[Any]], truth: NDArray[np.integer[Any]], labels: "Labels") -> Counts:
    """Count the pixels of one case.

    Args:
        prediction: Class indices of any shape, as `labels.from_probabilities` gives them.
        truth: Class indices of the same shape, `IGNORE` where a pixel is left out.
        labels: The label map.

    Returns:
        (classes, classes), or (regions, 2, 2) where there are regions.

    Raises:
        ValueError: The shapes differ, or an index is no class.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    classes = len(labels.names)
    # Where both are background, which is most of a volume, there is nothing to tell apart.
    box = bounding_box((truth != 0) | (prediction != 0))
    outside = truth.size - truth[box].size
    prediction, truth = prediction[box], truth[box]
    valid = truth != _IGNORE
    true, predicted = truth[valid].astype(np.int64), prediction[valid].astype(np.int64)
    for name, indices in (("truth", true), ("prediction", predicted)):
        if indices.size and not 0 <= indices.min() <= indices.max() < classes:
            low = min(indices.min(), 0) if outside else indices.min()
            raise ValueError(f"{name} has indices {low}..{indices.max()}, but there are {classes} classes")
    counts = np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    counts[0, 0] += outside
    if not labels.regions:
        return counts.astype(np.int64)
    inside = labels.onehot(np.arange(classes)).astype(np.int64)  # (regions, classes)
    sides = np.stack([1 - inside, inside], axis=1)  # (regions, 2, classes)
    folded: Counts = np.einsum("rtk,kl,rpl->rtp", sides, counts, sides)
    return folded


def confusion_shape(labels: "Labels") -> tuple[int, ...]:
    """The shape of what `count_confusion` returns."""
    return (len(labels.regions), 2, 2) if labels.regions else (len(labels.names), len(labels.names))


def describe_confusion(counts: Counts, labels: "Labels") -> dict[str, Any]:
    """Counts, summed over cases, as `summary.json` holds them.

    Returns:
        `{"names": [...], "counts": [[...]]}`, or `{"regions": {name: [[TN, FP], [FN, TP]]}}`.
    """
    if labels.regions:
        return {"regions": {name: own.tolist() for (name, _), own in zip(labels.regions, counts, strict=True)}}
    return {"names": list(labels.names), "counts": counts.tolist()}
