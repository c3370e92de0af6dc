"""What the values of the masks tell, once it is known what they mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visattn.doctor.findings import Findings
from visattn.doctor.reading import MaskPrint, Seen
from visattn.errors import UserError
from visattn.labels import IGNORE, Labels

_LOSSY = ("JPEG", "MPO")
_TINY = 12  # pixels
_TINY_SHARE = 1e-4
_LOOKS_BLACK = 20
_TWO_TONED = 0.97
_SAME_PICTURE = 0.98
_BORDER = 0.9


@dataclass(frozen=True, eq=False)
class Classes:
    """How many pixels of a mask have each class.

    Args:
        pixels: Per class, the background first; ignored pixels are left out.
        border: The same along the border.
    """

    pixels: NDArray[np.int64]
    border: NDArray[np.int64]

    @property
    def foreground(self) -> int:
        """Pixels of any class but the background."""
        return int(self.pixels[1:].sum())

    @property
    def inverted(self) -> bool:
        """Whether the foreground covers most of the picture and nearly all of its border, but not everything."""
        share = self.foreground / max(1, int(self.pixels.sum()))
        around = self.border[1:].sum() / max(1, int(self.border.sum()))
        return 0.5 < share < 1 and bool(around > _BORDER)


def check_values(seen: Sequence[Seen], labels: Labels, findings: Findings, given: bool) -> dict[str, Classes]:
    """Read the values of each mask through the label map.

    Args:
        seen: All cases.
        labels: The recipe's label map, or one guessed from the masks.
        findings: Where to note what is found.
        given: Whether the map is the recipe's; values outside of it are errors then.

    Returns:
        The classes of each mask that could be read, by the name of its case.
    """
    named = np.array([*(v for values in labels.values for v in values), *labels.ignore])
    found: dict[str, Classes] = {}
    for one in seen:
        if one.content is None:
            continue
        path, values = one.mask.path, one.content.values.astype(np.int64)
        try:
            indices = labels.encode(values, "")
        except UserError:
            if given:
                _outside(one.content, labels, findings, one)
            continue
        found[one.case.name] = _classes(one.content, indices, len(labels.names))
        stray = ~np.isin(values, named)
        if stray.any():
            pixels = int(one.content.counts[stray].sum())
            note = f"{pixels} pixels of values {listed_values(values[stray])}"
            findings.file("mask-jpeg" if one.mask.format in _LOSSY else "mask-soft-edges", path, note)
    top = max(named)
    if 0 < top < _LOOKS_BLACK:
        findings.whole("masks-look-black", f"the labels are {listed_values(np.unique(named))}")
    return found


def check_mixed(seen: Sequence[Seen], findings: Findings) -> None:
    """Whether some masks are written as 0 and 1 and others as 0 and 255."""
    tops = {one.mask.path: int(one.content.values[-1]) for one in seen if one.content is not None}
    ones = [path for path, top in tops.items() if top == 1]
    if not ones or 255 not in tops.values() or not set(tops.values()) <= {0, 1, 255}:
        return
    if any(one.content is not None and {1, 255} <= set(one.content.values.tolist()) for one in seen):
        return  # 255 stands beside 1: it is a value of its own
    full = [path for path, top in tops.items() if top == 255]
    for path in min(ones, full, key=len):
        findings.file("mixed-mask-values", path, f"0 and {tops[path]}")


def check_classes(seen: Sequence[Seen], found: dict[str, Classes], labels: Labels, findings: Findings) -> None:
    """Empty, full, inverted, tiny masks; labels never used; the share of each label."""
    masks = {one.case.name: one for one in seen if one.case.name in found}
    if not masks:
        return
    empty = [one for name, one in masks.items() if not found[name].foreground]
    if len(empty) == len(masks):
        findings.whole("all-masks-empty", f"all {len(masks)} are {labels.names[0]} alone")
        return
    for one in empty:
        findings.file("mask-empty", one.mask.path)
    if len(empty) > len(masks) / 2:
        findings.whole("masks-mostly-empty", f"{len(empty)} of {len(masks)}")
    binary = len(labels.names) == 2
    filled = [name for name in masks if found[name].foreground]
    inverted = [name for name in filled if binary and found[name].inverted]
    if len(inverted) >= 3 and len(inverted) > 0.8 * len(filled):
        findings.whole("masks-inverted", f"{len(inverted)} of {len(filled)}")
    elif len(inverted) <= 0.2 * len(filled):
        for name in inverted:
            share = found[name].foreground / found[name].pixels.sum()
            findings.file("mask-inverted", masks[name].mask.path, f"{share:.0%} foreground")
    for name in filled:
        _check_amount(masks[name], found[name], labels, findings)
    _check_balance(found, labels, findings)


def _check_amount(one: Seen, classes: Classes, labels: Labels, findings: Findings) -> None:
    assert one.content is not None
    total = int(classes.pixels.sum())
    if len(labels.names) == 2 and classes.foreground == total:
        findings.file("mask-full", one.mask.path)
    if classes.foreground <= max(_TINY, _TINY_SHARE * total):
        findings.file("tiny-foreground", one.mask.path, f"{classes.foreground} pixels")
    if one.content.lost:
        lost = ", ".join(labels.names[index] for index in one.content.lost)
        findings.file("vanishing-foreground", one.mask.path, lost)


def _check_balance(found: dict[str, Classes], labels: Labels, findings: Findings) -> None:
    pixels = np.sum([classes.pixels for classes in found.values()], axis=0)
    shown = []
    for index, name in enumerate(labels.names):
        masks = sum(1 for classes in found.values() if classes.pixels[index])
        if not masks:
            findings.whole("label-never-present", f"{name} ({listed_values(np.array(labels.values[index]))})")
        shown.append(f"{name} {pixels[index] / pixels.sum():.2%} of the pixels, in {masks} of {len(found)} masks")
    for text in shown:
        findings.whole("class-balance", text)


def check_swapped(seen: Sequence[Seen], findings: Findings) -> None:
    """Images that are copies of their masks, and folders that were swapped."""
    looks = [one for one in seen if one.look is not None]
    flat = {one.case.name for one in looks if one.look and one.look.two_toned >= _TWO_TONED and one.image.grey}
    rich = [one for one in seen if one.mask.error or (one.content is not None and len(one.content.values) > 64)]
    if len(flat) >= 3 and len(flat) > 0.8 * len(seen) and len(rich) > 0.5 * len(seen):
        findings.whole("folders-swapped", f"{len(flat)} of {len(seen)} images have two tones only")
        return
    for one in looks:
        assert one.look is not None
        copied = bool(one.digest) and one.digest == one.mask_digest
        if copied or (one.case.name in flat and one.look.like_mask >= _SAME_PICTURE):
            findings.file("image-is-mask", one.image.path, "the same file" if copied else "the same picture")


def _outside(content: MaskPrint, labels: Labels, findings: Findings, one: Seen) -> None:
    """Say why the label map refuses the values."""
    values = content.values.astype(np.int64)
    if values.tolist() in ([0, 1], [1]):
        findings.file("mask-zero-one", one.mask.path)
        return
    top = max(value for values in labels.values for value in values)
    wrong = []
    for index, value in enumerate(values.tolist()):
        try:
            labels.encode(np.array([value, top]), "")  # beside another, so that a lone 1 is not taken for a 0/1 mask
        except UserError:
            wrong.append((value, int(content.counts[index])))
    listed = listed_values(np.array([value for value, _ in wrong]))
    findings.file("values-outside-labels", one.mask.path, f"{sum(n for _, n in wrong)} pixels of values {listed}")


def _classes(content: MaskPrint, indices: NDArray[np.uint8], number: int) -> Classes:
    counts = np.bincount(indices, content.counts, minlength=IGNORE + 1)[:number]
    border = np.bincount(indices, content.border, minlength=IGNORE + 1)[:number]
    return Classes(counts.astype(np.int64), border.astype(np.int64))


def listed_values(values: NDArray[np.int64]) -> str:
    """1, 2, 5-9: runs are drawn together, and long lists cut."""
    runs: list[list[int]] = []
    for value in values.tolist():
        if runs and value == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], value]
        else:
            runs.append([value])
    shown = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")
