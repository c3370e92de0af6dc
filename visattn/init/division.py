"""Which images train and which validate: as folders say, as names say, or as the pictures themselves say."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visattn.doctor.reading import colours
from visattn.doctor.sequences import find_sequences
from visattn.doctor.twins import find_twins, gather, thumbnail
from visattn.survey import Pair, Survey, guess_group_by

_LARGEST = 0.5  # of all images in one group: what is left would be too little to learn from
_FEWEST = 3


@dataclass(frozen=True)
class Division:
    """How the data is divided.

    Args:
        block: Keys of the recipe's `split` with value and reason.
        training: Number of training images, roughly where groups stay whole.
        validation: Number of validation images, likewise.
        told: The groups in a few words, or empty.
        files: Further files, by path, that the block names.
        notes: What a person has to check.
    """

    block: dict[str, tuple[Any, str]]
    training: int
    validation: int
    told: str = ""
    files: dict[Path, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def look(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """What `divide` needs of an image (H, W, 3): its thumbnail and its colours."""
    return thumbnail(np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)), colours(image)


def divide(found: Survey, output: Path) -> Division:
    """Decide what validates, and what must not be parted.

    Args:
        found: The data, surveyed with `look`.
        output: The recipe, beside which further files go.
    """
    train, val = found.of("train"), found.of("val")
    if val:
        path = output.with_name(f"{output.stem}.splits.json")
        why = f"as the folders divide the data: {len(train)} images train, {len(val)} validate"
        block = {"files": (str(path), why)}
        return Division(block, len(train), len(val), "as in the folders", {path: _split_file(train, val)})
    share = 0.1 if len(train) >= 200 else 0.15 if len(train) >= 100 else 0.2 if len(train) >= 50 else 0.25
    validating = max(1, round(share * len(train)))
    group_by, told, files, notes = _groups(train, output)
    reason = (
        f"{told}, none of which is on both sides of the split" if told else "nothing tells that images belong together"
    )
    return Division(
        {
            "val": (share, f"about {validating} of {len(train)} images, on which the best epoch is chosen"),
            "test": (0.0, "for scores on images that nothing was chosen by, set a share aside or give test_root"),
            "group_by": (group_by, reason),
        },
        len(train) - validating,
        validating,
        told,
        files,
        notes,
    )


def _groups(train: Sequence[Pair], output: Path) -> tuple[str | None, str, dict[Path, str], tuple[str, ...]]:
    """`group_by`, what it was found from, the table that it names, and notes."""
    named = guess_group_by([pair.stem for pair in train])
    if named is not None:
        return named[0], named[1], {}, ()
    together, what = _alike(train)
    if not together:
        note = "neither names nor pictures tell which images show one patient; if some do, set data.split.group_by"
        return None, "", {}, (note,)
    count = len(train) - sum(len(members) - 1 for members in together)
    if count < _FEWEST or max(len(members) for members in together) > _LARGEST * len(train):
        note = f"{what}, too long to be kept whole: validation will look too good; divide them by hand"
        return None, "", {}, (note,)
    path = output.with_name(f"{output.stem}.groups.csv")
    note = f"{path.name} keeps together {what}; whether one patient is in several, only you know"
    return f"{path}:group", what, {path: _table(train, together)}, (note,)


def _alike(train: Sequence[Pair]) -> tuple[list[list[int]], str]:
    """Indices of images that belong together by their looks, and what they are; of equal names in two folders too."""
    looks = [pair.kept for pair in train]
    thumbnails, tints = (np.stack(part) for part in zip(*looks, strict=True))
    folders: dict[Path, list[int]] = {}
    stems: dict[str, list[int]] = {}
    for index, pair in enumerate(train):
        folders.setdefault(pair.image.path.parent, []).append(index)
        stems.setdefault(pair.stem, []).append(index)
    videos = []
    for members in folders.values():
        frames = find_sequences([train[index].stem for index in members], thumbnails[members], tints[members])
        videos += [[members[position] for position in frame] for frame in frames]
    twins = [(twin.first, twin.second) for twin in find_twins(thumbnails)]
    if not videos and not twins:
        return [], ""
    counts = ((len(videos), "run", "of video frames"), (len(gather(twins)), "set", "of nearly equal images"))
    told = [f"{count} {kind}{'s' if count > 1 else ''} {what}" for count, kind, what in counts if count]
    # The table knows files by their names alone, so equal names go into one group.
    chains = [*videos, *stems.values()]
    links = [(first, second) for chain in chains for first, second in pairwise(chain)]
    return gather([*twins, *links]), " and ".join(told)


def _table(train: Sequence[Pair], together: Sequence[Sequence[int]]) -> str:
    groups = {index: f"alike_{number}" for number, members in enumerate(together, 1) for index in members}
    rows = {pair.image.path.name: groups.get(index, pair.stem) for index, pair in enumerate(train)}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "group"))
    writer.writerows(rows.items())
    return text.getvalue()


def _split_file(train: Sequence[Pair], val: Sequence[Pair]) -> str:
    names = {"train": [pair.name for pair in train], "val": [pair.name for pair in val], "test": []}
    return json.dumps(names, indent=1) + "\n"
