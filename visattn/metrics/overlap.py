"""Overlap of two binary masks: Dice, IoU, precision, recall and specificity from four counts.

Any number of axes. The counts are taken once, so that all five numbers cost one pass over the masks.

    dice = 2 TP / (2 TP + FP + FN)        precision   = TP / (TP + FP)
    iou  =   TP / (TP + FP + FN)          recall      = TP / (TP + FN)
                                          specificity = TN / (TN + FP), and 0 where TP = 0

The clause on specificity is the one of PraNet's evaluation code, which gives a case without a single hit zero on every
overlap measure. Without it a network that finds nothing would have the best specificity there is.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Counts:
    """Pixels of one class in one case, by truth and prediction.

    Args:
        tp: In both.
        fp: In the prediction alone.
        fn: In the truth alone.
        tn: In neither; ignored pixels are not among them.
    """

    tp: int
    fp: int
    fn: int
    tn: int


def count(prediction: Mask, truth: Mask, valid: int | None = None) -> Counts:
    """Count the pixels of two masks of equal shape.

    Args:
        prediction: True where the class was predicted; False at ignored pixels.
        truth: True where the class is; False at ignored pixels.
        valid: How many pixels count; default: all.
    """
    tp = int(np.count_nonzero(prediction & truth))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(truth)) - tp
    return Counts(tp, fp, fn, (truth.size if valid is None else valid) - tp - fp - fn)


def overlap_metrics(counts: Counts) -> dict[str, float | None]:
    """The five overlap measures of a case whose truth and prediction both hold the class.

    Returns:
        dice, iou, precision, recall, specificity; the last is None where the truth fills the image, which leaves no
        background to be right about.
    """
    tp, fp, fn, tn = counts.tp, counts.fp, counts.fn, counts.tn
    specificity = 0.0 if tp == 0 else None if tn + fp == 0 else tn / (tn + fp)
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "specificity": specificity,
    }
