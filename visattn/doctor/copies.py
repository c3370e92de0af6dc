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


def check_copies(
    seen: Sequence[Seen],
    parts: Mapping[str, str],
    groups: Mapping[str, str],
    findings: Findings,
    videos: bool = True,
) -> list[tuple[int, int]]:
    """Compare images and masks with each other.

    Args:
        seen: All cases.
        parts: train, val or test for each case's name; empty where nothing divides them.
        groups: The group of each case's name, where the recipe forms groups: copies in one group are no matter.
        findings: Where to note what is found.
        videos: Whether names tell an order, so that neighbours can be frames.

    Returns:
        Pairs of indices of `seen` that belong together: copies, and frames of one video.
    """
    exact = _sets((one.digest, index) for index, one in enumerate(seen) if one.digest)
    for members in exact:
        together = [seen[index] for index in members]
        if _across(together, parts):
            _tell("duplicate-across-parts", together, parts, findings)
        elif not _grouped(together, groups):
            _tell("duplicate-image", together, parts, findings)
        masks = {one.content.digest for one in together if one.content is not None}
        if len(masks) > 1:
            _tell("same-image-different-masks", together, {}, findings, masks=True)
    _check_masks(seen, findings)
    ties = [(members[0], index) for members in exact for index in members[1:]]
    return ties + _check_pictures(seen, parts, groups, findings, videos)


def _check_pictures(
    seen: Sequence[Seen], parts: Mapping[str, str], groups: Mapping[str, str], findings: Findings, videos: bool
) -> list[tuple[int, int]]:
    """Copies by eye, and videos; the pairs that they tie."""
    looks = [(index, one.look) for index, one in enumerate(seen) if one.look is not None]
    if len(looks) < 2:
        return []
    thumbnails = np.stack([look.thumbnail for _, look in looks])
    twins = [(looks[twin.first][0], looks[twin.second][0], twin.turned) for twin in find_twins(thumbnails)]
    ties = [(first, second) for first, second, _ in twins]
    for turned in (False, True):
        pairs = [(a, b) for a, b, t in twins if t is turned and seen[a].digest != seen[b].digest]
        for members in gather(pairs):
            together = [seen[index] for index in members]
            if _across(together, parts):
                _tell("near-duplicate-across-parts", together, parts, findings)
            elif not _grouped(together, groups):
                _tell("mirrored-image" if turned else "near-duplicate-image", together, parts, findings)
    if not videos:
        return ties
    colours = np.stack([look.colours for _, look in looks])
    by_folder: dict[Path, list[int]] = defaultdict(list)
    for position, (index, _) in enumerate(looks):
        by_folder[seen[index].case.image.parent].append(position)
    for members in by_folder.values():
        stems = [seen[looks[position][0]].case.image.stem for position in members]
        films = [
            [looks[members[place]][0] for place in film]
            for film in find_sequences(stems, thumbnails[members], colours[members])
        ]
        _tell_videos([[seen[index] for index in film] for film in films], parts, findings)
        ties += [(film[0], index) for film in films for index in film[1:]]
    return ties


def _tell_videos(videos: Sequence[Sequence[Seen]], parts: Mapping[str, str], findings: Findings) -> None:
    """Videos that nothing keeps together yet, or that the parts tear."""
    if videos and not parts:
        ends = [(printable(video[0].case.image.stem), printable(video[-1].case.image.stem)) for video in videos]
        shown = ", ".join(f"{first} to {last}" for first, last in ends[:_SHOWN])
        more = f" and {len(ends) - _SHOWN} more" if len(ends) > _SHOWN else ""
        count = sum(len(video) for video in videos)
        findings.whole("video-frames", f"{count} files in {len(videos)} runs, about {shown}{more}")
    for video in videos:
        if _across(video, parts):
            both = ", ".join(sorted({parts[one.case.name] for one in video if one.case.name in parts}))
            findings.file("video-across-parts", video[0].case.image, f"to {video[-1].case.image.name}, in {both}")


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


def _grouped(together: Sequence[Seen], groups: Mapping[str, str]) -> bool:
    return len({groups.get(one.case.name, one.case.name) for one in together}) == 1


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
