"""Lesions found, missed and invented: precision, recall and F1 over lesions and over patients, by lesion volume.

A lesion is a connected set of voxels of one class; voxels touch by a face, an edge or a corner (26 neighbours, 8 in an
image). True and predicted lesions are matched one to one:

* two lesions can be matched if the IoU of their voxels is at least `LesionRule.iou`. The default, 0.1, is that of
  3-D detection (Baumgartner et al., nnDetection, MICCAI 2021, https://arxiv.org/abs/2106.00817): small lesions seldom
  reach more, and lesions of one mask do not overlap each other, so that 0.1 does not take one for another;
* of all one-to-one matchings, the one with the largest sum of IoU counts (Kuhn 1955, scipy's `linear_sum_assignment`).

A lesion below the minimum volume does not count, whether true or predicted: a true one is not missed, a prediction that
is matched with it is not false, nor is a small unmatched prediction. Matching comes first, so that a prediction a
little below the minimum still finds a lesion a little above it.

A prediction merges if more than half of each of two or more true lesions lies in it; a true lesion is split if more
than half of each of two or more predictions lies in it. Merging and splitting are counted beside the scores: in them, a
merge is one lesion found and the others missed, a split one prediction right and the others false.

Patients are counted as in Bouget et al., "Meningioma segmentation in T1-weighted MRI leveraging global context and
attention mechanisms", 2021 (https://doi.org/10.3389/fradi.2021.711514), whose groups below and from 3 ml are ours too:
a patient with the class is found if the Dice of the whole class reaches a threshold, else missed; something predicted
without being right, in a healthy head or beside the lesion, is a false detection. The threshold is a setting here.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from visattn.metrics.overlap import Mask

PATIENT_DICE = 0.25
"""Dice from which a patient counts as found."""

DETAILS = (
    *("true_ml", "predicted_ml"),
    *("true_small", "found_small", "false_small", "true_large", "found_large", "false_large"),
    *("merges", "splits"),
)
"""What a row holds beside the scores of the suite "volume": volumes, and numbers of lesions below and from 3 ml."""

_SLACK = 1e-9  # volumes and IoU are quotients of whole numbers; 0.1 is 0.1
_MORE = 1e-6  # of equal sums of IoU, the matching of more lesions


@dataclass(frozen=True)
class LesionRule:
    """When a lesion counts and when it is found.

    Args:
        iou: IoU from which a true and a predicted lesion can be matched; 0: any common voxel.
        minimum_ml: Volume below which lesions do not count.
        large_ml: Volume from which a lesion belongs to the group of large ones.
    """

    iou: float = 0.1
    minimum_ml: float = 0.0
    large_ml: float = 3.0

    def __post_init__(self) -> None:
        if not (0 <= self.iou <= 1 and self.minimum_ml >= 0 and self.large_ml > 0):
            raise ValueError(f"needs 0 <= iou <= 1, minimum_ml >= 0 and large_ml > 0, got {self}")


RULE = LesionRule()
"""The defaults."""


@dataclass(frozen=True)
class Lesions:
    """The lesions of one class in one case.

    Attributes:
        true: Voxels of each true lesion, (T,).
        predicted: Voxels of each predicted lesion, (P,).
        pairs: True and predicted lesion that have voxels in common, (N, 2).
        common: How many voxels, (N,).
    """

    true: NDArray[np.int64]
    predicted: NDArray[np.int64]
    pairs: NDArray[np.int64]
    common: NDArray[np.int64]

    @property
    def iou(self) -> NDArray[np.float64]:
        """IoU of each of `pairs`, (N,)."""
        sizes = self.true[self.pairs[:, 0]] + self.predicted[self.pairs[:, 1]]
        return np.asarray(self.common / (sizes - self.common), np.float64)


@dataclass(frozen=True)
class Detection:
    """How many were there, found and invented, over all cases.

    Attributes:
        true: Lesions, or patients, in the truth.
        found: Those that were found.
        false: Predictions that find nothing.
    """

    true: int = 0
    found: int = 0
    false: int = 0

    @property
    def precision(self) -> float:
        """Share of predictions that are right; NaN where nothing was predicted."""
        return self.found / (self.found + self.false) if self.found + self.false else math.nan

    @property
    def recall(self) -> float:
        """Share that was found; NaN where there was nothing to find."""
        return self.found / self.true if self.true else math.nan

    @property
    def f1(self) -> float:
        """Harmonic mean of both; NaN where nothing was there and nothing predicted."""
        total = self.true + self.found + self.false
        return 2 * self.found / total if total else math.nan

    def to_json(self) -> dict[str, float]:
        """Numbers and shares."""
        counts = {"true": self.true, "found": self.found, "false": self.false}
        return counts | {"precision": self.precision, "recall": self.recall, "f1": self.f1}


def find_lesions(prediction: Mask, truth: Mask) -> Lesions:
    """Find the lesions of two masks of equal shape, and how they overlap."""
    structure = np.ones((3,) * truth.ndim)
    true, _ = ndimage.label(truth, structure)
    predicted, count = ndimage.label(prediction, structure)
    both = (true > 0) & (predicted > 0)
    keys, common = np.unique(true[both].astype(np.int64) * (count + 1) + predicted[both], return_counts=True)
    pairs = np.stack([keys // (count + 1) - 1, keys % (count + 1) - 1], axis=1)
    sizes = [np.bincount(numbers[mask])[1:] for numbers, mask in ((true, truth), (predicted, prediction))]
    return Lesions(sizes[0], sizes[1], pairs, common)


def match_lesions(lesions: Lesions, iou: float = RULE.iou) -> NDArray[np.int64]:
    """Match true and predicted lesions one to one by the largest sum of IoU.

    Args:
        lesions: Of one case.
        iou: What a pair needs at least.

    Returns:
        (matches, 2): true and predicted lesion.
    """
    overlap = lesions.iou
    able = overlap >= iou * (1 - _SLACK)
    pairs, overlap = lesions.pairs[able], overlap[able]
    shape = len(lesions.true), len(lesions.predicted)
    if not len(pairs):
        return pairs
    # Only lesions that overlap compete, so the assignment is solved for each cluster alone, however many there are.
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1] + shape[0])), shape=(sum(shape), sum(shape)))
    _, cluster = connected_components(graph, directed=False)
    order = np.argsort(cluster[pairs[:, 0]], kind="stable")
    ends = np.flatnonzero(np.diff(cluster[pairs[order, 0]])) + 1
    matches = []
    for members in np.split(order, ends):
        if len(members) == 1:
            matches.append(pairs[members])
            continue
        rows, row = np.unique(pairs[members, 0], return_inverse=True)
        columns, column = np.unique(pairs[members, 1], return_inverse=True)
        weights = np.zeros((len(rows), len(columns)))
        weights[row, column] = overlap[members] + _MORE
        chosen = np.stack(linear_sum_assignment(weights, maximize=True), axis=1)
        chosen = chosen[weights[chosen[:, 0], chosen[:, 1]] > 0]
        matches.append(np.stack([rows[chosen[:, 0]], columns[chosen[:, 1]]], axis=1))
    found = np.concatenate(matches)
    return np.asarray(found[np.lexsort(found.T[::-1])], np.int64)


def lesion_measures(lesions: Lesions, voxel_ml: float, rule: LesionRule = RULE) -> dict[str, float | None]:
    """The scores of one case over its lesions, and their numbers.

    Args:
        lesions: Of one class.
        voxel_ml: Volume of a voxel.
        rule: What counts.

    Returns:
        `lesion_precision`, `lesion_recall`, `lesion_f1`: None where there is neither a true nor a predicted lesion, 0
        where one of the two is missing, but no recall without a true one. Then `DETAILS` without the volumes.
    """
    matches = match_lesions(lesions, rule.iou)
    true_ml, predicted_ml = lesions.true * voxel_ml, lesions.predicted * voxel_ml
    least = rule.minimum_ml * (1 - _SLACK)
    counts, could_count = true_ml >= least, predicted_ml >= least
    found = np.zeros(len(true_ml), bool)
    found[matches[:, 0]] = True
    false = could_count.copy()
    false[matches[:, 1]] = False
    details: dict[str, float | None] = {}
    for name, of_true, of_predicted in (
        ("small", ~_large(true_ml, rule), ~_large(predicted_ml, rule)),
        ("large", _large(true_ml, rule), _large(predicted_ml, rule)),
    ):
        details[f"true_{name}"] = float(np.count_nonzero(counts & of_true))
        details[f"found_{name}"] = float(np.count_nonzero(counts & found & of_true))
        details[f"false_{name}"] = float(np.count_nonzero(false & of_predicted))
    # A prediction that is matched counts whatever its size, as it does in the scores.
    could_count[matches[counts[matches[:, 0]], 1]] = True
    both = counts[lesions.pairs[:, 0]] & could_count[lesions.pairs[:, 1]]
    (true, predicted), common = lesions.pairs[both].T, lesions.common[both]
    inside = np.bincount(predicted[2 * common > lesions.true[true]], minlength=1)
    details["merges"] = float(np.count_nonzero(inside >= 2))
    inside = np.bincount(true[2 * common > lesions.predicted[predicted]], minlength=1)
    details["splits"] = float(np.count_nonzero(inside >= 2))
    return {f"lesion_{name}": value for name, value in _scores(_lesions_of(details)).items()} | details


def detections(
    rows: Iterable[Mapping[str, Any]], dice: float = PATIENT_DICE, large_ml: float = RULE.large_ml
) -> dict[str, dict[str, Detection]]:
    """Lesions and patients pooled over all cases, for each class.

    Args:
        rows: A table of cases in the suite "volume", as in `cases.csv`. Each case is a patient.
        dice: From where on a patient counts as found.
        large_ml: Volume of the class in all from where on a patient is counted as one with a large lesion. A false
            detection in a healthy head goes by the volume that was predicted.

    Returns:
        For each class, `lesions`, `lesions_small`, `lesions_large`, `patients`, `patients_small` and
        `patients_large`; no entry for a class whose rows lack the numbers.
    """
    found: dict[str, dict[str, Detection]] = {}
    for row in rows:
        values = {name: _number(row.get(name)) for name in DETAILS}
        if any(value is None for value in values.values()):
            continue
        of_class = found.setdefault(str(row["class"]), {})
        true_ml, predicted_ml = values["true_ml"] or 0.0, values["predicted_ml"] or 0.0
        hit = (_number(row.get("dice")) or 0.0) >= dice and true_ml > 0 and predicted_ml > 0
        patient = Detection(int(true_ml > 0), int(hit), int(predicted_ml > 0 and not hit))
        size = "large" if (true_ml or predicted_ml) >= large_ml * (1 - _SLACK) else "small"
        entries = {
            "lesions": _lesions_of(values),
            "lesions_small": _lesions_of(values, ("small",)),
            "lesions_large": _lesions_of(values, ("large",)),
            "patients": patient,
            "patients_small": patient if size == "small" else Detection(),
            "patients_large": patient if size == "large" else Detection(),
        }
        for name, entry in entries.items():
            before = of_class.get(name, Detection())
            of_class[name] = Detection(before.true + entry.true, before.found + entry.found, before.false + entry.false)
    return found


def _large(volumes: NDArray[Any], rule: LesionRule) -> NDArray[np.bool_]:
    return volumes >= rule.large_ml * (1 - _SLACK)


def _lesions_of(values: Mapping[str, float | None], sizes: tuple[str, ...] = ("small", "large")) -> Detection:
    return Detection(
        *(int(sum(values[f"{kind}_{size}"] or 0 for size in sizes)) for kind in ("true", "found", "false"))
    )


def _scores(detection: Detection) -> dict[str, float | None]:
    """Precision, recall and F1 of one case by the policy of empty masks."""
    if not detection.true + detection.false + detection.found:
        return {"precision": None, "recall": None, "f1": None}
    return {
        "precision": detection.precision if detection.found else 0.0,
        "recall": detection.recall if detection.true else None,
        "f1": detection.f1,
    }


def _number(value: Any) -> float | None:
    if value is None or value == "":
        return None
    number = float(value)
    return None if math.isnan(number) else number
