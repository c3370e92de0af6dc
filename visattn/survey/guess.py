"""Guesses from what a data set holds: the label map from mask values, the patient from file names.

They are written into a recipe for a person to check, and each says in words what it was made from.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from visattn.errors import UserError

_BACKGROUND = "background"
_NOISE = 8  # as far from a label as the label map forgives, where labels lie at least _SAFE_GAP apart
_SAFE_GAP = 16
_SMALL = 64  # labels are numbered through from 0; a lone 255 above them marks what is not to count
_VOID = 255
_SOFT_SHARE = 0.1  # the most pixels between black and white that edges and compression account for
_EDGE_SHARE = 0.002  # noisy values between black and white that are no class of their own
_OBJECTS = 24  # more classes than this, numbered through, are rather objects that were counted

_NAMES = {
    "polyp": ("polyp", "kvasir", "clinicdb", "colondb", "etis", "endoscene"),
    "lesion": ("lesion", "isic", "ph2", "ham10000"),
    "nucleus": ("nuclei", "nucleus", "dsb2018", "monuseg"),
    "vessel": ("vessel", "chase", "stare", "drive", "hrf"),
    "tumour": ("tumor", "tumour", "brats", "busi"),
    "cell": ("cell",),
    "lung": ("lung",),
}
"""What the one class is called where the name of the data set says it."""

_KEYWORDS = ("patient", "pat", "subject", "subj", "sub", "person", "case", "study", "video", "vid", "sequence", "seq",
             "series", "scan", "volume", "vol")  # fmt: skip
_GROUPINGS = (
    *((rf"(?i)(?:^|[_\W])({word}[_ -]?[0-9]+)[_\W]", 2, f"names hold '{word}' and a number") for word in _KEYWORDS),
    (r"^(.*[0-9])[_ -]?(?:L|R|l|r|OD|OS|left|right|Left|Right)$", 3, "left and right of one person"),
    (
        r"(?i)^(.+?)[_ -](?:slice|frame|img|image|patch|tile|crop|z|t|s|f)?[_ -]?[0-9]+$",
        8,
        "numbered parts of one name",
    ),
)
"""Expressions for `group_by`, the fewest groups that make each plausible, and what it says; people before videos."""
_LARGEST = 0.5  # share of the images in one group beyond which a prefix is the data set's name rather than a person


@dataclass(frozen=True)
class LabelGuess:
    """A label map and what it was guessed from.

    Args:
        labels: Names and file values, the background first, as a recipe's `labels`.
        ignore: The file value of pixels that do not count, or None.
        why: In a few words, what in the masks says so.
        doubts: What a person has to check.
    """

    labels: dict[str, int | list[int]]
    ignore: int | None = None
    why: str = ""
    doubts: list[str] = field(default_factory=list)


def guess_labels(values: Mapping[int, int], name: str = "") -> dict[str, int | list[int]]:
    """The label map that the pixel counts of all masks suggest; see `guess_label_map`."""
    return guess_label_map([values], name).labels


def guess_label_map(masks: Iterable[Mapping[int, int]], name: str = "") -> LabelGuess:
    """A label map for masks with these values.

    Args:
        masks: For each mask, its values and how many pixels have them.
        name: The name of the data set's folder, which may tell what the one class is.

    Raises:
        UserError: All masks hold one value only, or no set of labels explains the values.
    """
    masks = list(masks)
    total: Counter[int] = Counter()
    for mask in masks:
        total.update(dict(mask))
    values = sorted(total)
    if not values or values[0] < 0 or values[-1] > 65535:
        raise UserError(
            f"masks: {'no values' if not values else f'values from {values[0]} to {values[-1]}'}, no labels"
        )
    if len(values) == 1:
        raise UserError(f"masks: every pixel of all masks is {values[0]}; there is nothing to learn")
    thing = _thing(name)
    if values == [0, 1, _VOID] and not any(1 in mask and _VOID in mask for mask in masks):
        doubt = "some masks are 0/1 and others 0/255; both are read"
        return LabelGuess({_BACKGROUND: 0, thing: [1, _VOID]}, None, "masks hold 0/1 or 0/255", [doubt])
    if len(values) > 2 and values[-1] == _VOID and values[-2] <= _SMALL and _numbered(values[:-1]):
        inner = _exact(values[:-1], thing)
        doubt = f"{_VOID} is taken as 'does not count'; if it is a class, move it from ignore to labels"
        return LabelGuess(inner.labels, _VOID, f"{inner.why}, and {_VOID}", [*inner.doubts, doubt])
    clusters = _clusters(values)
    if values[-1] > _VOID or len(values) == 2 or all(len(cluster) == 1 for cluster in clusters) or _numbered(values):
        return _exact(values, thing)
    middle = sum(total[value] for cluster in clusters[1:-1] for value in cluster)
    if 2 < len(clusters) <= _OBJECTS and middle > _EDGE_SHARE * sum(total.values()):
        peaks = [max(cluster, key=lambda value: total[value]) for cluster in clusters]
        apart = all(after - before >= _SAFE_GAP for before, after in pairwise(peaks))
        near = all(abs(v - peak) <= _NOISE for cluster, peak in zip(clusters, peaks, strict=True) for v in cluster)
        if apart and near:
            why = f"mask values lie about {_listed(peaks)}, within {_NOISE}, as JPEG leaves them"
            return LabelGuess(_named(peaks, thing), None, why, ["the masks are noisy: PNG would keep the values"])
    return _soft(total, thing)


def guess_group_by(stems: Sequence[str]) -> tuple[str, str] | None:
    """What in the names of the files tells the patient or the video, if anything plausibly does.

    Args:
        stems: The names of all images, without suffix.

    Returns:
        A regular expression with one group, as a recipe's `group_by`, and what it was guessed from; or None.
    """
    for expression, least, why in _GROUPINGS:
        found = [re.search(expression, stem) for stem in stems]
        if not all(found):
            continue
        sizes = Counter(match[1] for match in found if match)
        if least <= len(sizes) < len(stems) and max(sizes.values()) <= _LARGEST * len(stems):
            return expression, f"{why}: {len(sizes)} groups"
    return None


def _soft(total: Mapping[int, int], thing: str) -> LabelGuess:
    """Two labels whose edges or compression left values between and about them."""
    values = sorted(total)
    low = 0 if values[0] <= _NOISE else values[0]
    high = _VOID if _VOID - _NOISE <= values[-1] <= _VOID else values[-1]
    count = sum(total.values())
    between = sum(number for value, number in total.items() if low + 2 * _NOISE < value < high - 2 * _NOISE)
    if high - low < 2 * _SAFE_GAP or between > _SOFT_SHARE * count:
        raise UserError(
            f"masks: {len(values)} values from {values[0]} to {values[-1]}, {between / count:.0%} of the pixels "
            "between them: these look like grey images or probabilities, not labels.\n"
            "Save masks with one value for each class; is the folder of masks the right one?"
        )
    why = f"masks hold {len(values)} values, almost all about {low} and {high} (soft edges or JPEG)"
    return LabelGuess({_BACKGROUND: low, thing: high}, None, why, [])


def _exact(values: Sequence[int], thing: str) -> LabelGuess:
    why = f"masks hold {_listed(values)}"
    doubts = [] if values[0] == 0 else [f"no mask holds 0; {values[0]} is taken for the background"]
    if len(values) > _OBJECTS + 1 and (_numbered(values) or values[-1] > _VOID):
        doubts.append("the values look like numbers of objects; all are merged into one class")
        return LabelGuess({_BACKGROUND: values[0], thing: list(values[1:])}, None, why, doubts)
    return LabelGuess(_named(values, thing), None, why, doubts)


def _named(values: Sequence[int], thing: str) -> dict[str, int | list[int]]:
    if len(values) == 2:
        return {_BACKGROUND: values[0], thing: values[1]}
    return {_BACKGROUND: values[0], **{f"label_{index}": value for index, value in enumerate(values[1:], 1)}}


def _numbered(values: Sequence[int]) -> bool:
    """Whether the values are small or run through without large gaps, as class numbers do."""
    return values[-1] <= _SMALL or (values[0] <= 1 and len(values) > 0.8 * values[-1] and values[-1] != _VOID)


def _clusters(values: Sequence[int]) -> list[list[int]]:
    """The values, parted where two neighbours lie further apart than noise around one label."""
    clusters = [[values[0]]]
    for before, after in pairwise(values):
        if after - before > _NOISE:
            clusters.append([])
        clusters[-1].append(after)
    return clusters


def _thing(name: str) -> str:
    lower = name.lower()
    return next((thing for thing, hints in _NAMES.items() if any(hint in lower for hint in hints)), "foreground")


def _listed(values: Sequence[int]) -> str:
    if len(values) > 8:
        return f"{len(values)} values from {values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values[:-1]) + f" and {values[-1]}"
