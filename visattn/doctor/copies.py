"""The same thing twice: files, masks, pictures, frames of a video; and whether the parts of a split share them."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from visattn.doctor.findings import Findings, printable
from visattn.doctor.reading import Seen
from visattn.doctor.sequences import find_sequences
from visattn.doctor.twins import find_twins, gather

_SHOWN = 6


def check_copies(seen: Sequence[Seen], parts: Mapping[str, str], findings: Findings) -> None:
    """Compare images and masks with each other.

    Args:
        seen: All cases.
        parts: train, val or test for each case's name; empty where nothing divides them.
        findings: Where to note what is found.
    """
    exact = _sets((one.digest, index) for index, one in enumerate(seen) if one.digest)
    for members in exact:
        together = [seen[index] for index in members]
        across = _across(together, parts)
        _tell("duplicate-across-parts" if across else "duplicate-image", together, parts, findings)
        masks = {one.content.digest for one in together if one.content is not None}
        if len(masks) > 1:
            _tell("same-image-different-masks", together, {}, findings, masks=True)
    _check_pictures(seen, parts, findings)
    _check_masks(seen, findings)


def _check_pictures(seen: Sequence[Seen], parts: Mapping[str, str], findings: Findings) -> None:
    looks = [(index, one.look) for index, one in enumerate(seen) if one.look is not None]
    if len(looks) < 2:
        return
    thumbnails = np.stack([look.thumbnail for _, look in looks])
    twins = [
        (looks[twin.first][0], looks[twin.second][0], twin.turned)
        for twin in find_twins(thumbnails)
        if seen[looks[twin.first][0]].digest != seen[looks[twin.second][0]].digest
    ]
    for turned in (False, True):
        for members in gather([(a, b) for a, b, t in twins if t is turned]):
            together = [seen[index] for index in members]
            code = "mirrored-image" if turned else "near-duplicate-image"
            across = _across(together, parts)
            _tell("near-duplicate-across-parts" if across else code, together, parts, findings)
    colours = np.stack([look.colours for _, look in looks])
    _check_videos([seen[index] for index, _ in looks], thumbnails, colours, parts, findings)


def _check_videos(
    seen: Sequence[Seen],
    thumbnails: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]",
    colours: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]",
    parts: Mapping[str, str],
    findings: Findings,
) -> None:
    by_folder: dict[Path, list[int]] = defaultdict(list)
    for index, one in enumerate(seen):
        by_folder[one.case.image.parent].append(index)
    for members in by_folder.values():
        stems = [seen[index].case.image.stem for index in members]
        videos = find_sequences(stems, thumbnails[members], colours[members])
        told = [(stems[video[0]], stems[video[-1]], len(video)) for video in videos]
        shown = ", ".join(f"{printable(a)} to {printable(b)}" for a, b, _ in told[:_SHOWN])
        more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
        if videos and not parts:
            count = sum(length for _, _, length in told)
            findings.whole("video-frames", f"{count} files in {len(told)} runs, about {shown}{more}")
        for video in videos:
            together = [seen[members[position]] for position in video]
            if _across(together, parts):
                both = ", ".join(sorted({parts[one.case.name] for one in together if one.case.name in parts}))
                findings.file(
                    "video-across-parts", together[0].case.image, f"to {together[-1].case.image.name}, in {both}"
                )


def _check_masks(seen: Sequence[Seen], findings: Findings) -> None:
    """Equal masks of different images; masks of one value only are equal without meaning anything."""
    masks = (
        (one.content.digest, index)
        for index, one in enumerate(seen)
        if one.content is not None and len(one.content.values) > 1
    )
    for members in _sets(masks):
        pictures = {seen[index].digest for index in members}
        if len(pictures) > 1:
            _tell("mask-repeated", [seen[index] for index in members], {}, findings, masks=True)


def _sets(entries: Iterable[tuple[Hashable, int]]) -> list[list[int]]:
    """Indices that share a key, where there is more than one."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for key, index in entries:
        found[key].append(index)
    return [members for members in found.values() if len(members) > 1]


def _across(together: Sequence[Seen], parts: Mapping[str, str]) -> bool:
    return len({parts[one.case.name] for one in together if one.case.name in parts}) > 1


def _tell(
    code: str, together: Sequence[Seen], parts: Mapping[str, str], findings: Findings, masks: bool = False
) -> None:
    """One place for each set: its first file, and the others in the note."""
    first, *others = together

    def called(one: Seen) -> str:
        part = f" ({parts[one.case.name]})" if one.case.name in parts else ""
        return (one.case.mask if masks else one.case.image).name + part

    listed = ", ".join(called(one) for one in others[:_SHOWN])
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    own = f" ({parts[first.case.name]})" if first.case.name in parts else ""
    findings.file(code, first.case.mask if masks else first.case.image, f"{own} = {listed}{more}".strip())
