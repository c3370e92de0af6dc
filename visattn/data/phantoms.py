"""What the word phantom means as a root: synthetic data of several kinds, drawn by name instead of read.

`phantom` alone is the first kind, colonoscopy for images and heads for volumes; `phantom:KIND` is any. What draws them
is in `visattn.data.phantom`, `phantom_head` and `phantom_hippocampus`; this file imports none of it.
"""

from typing import Final

from visattn.errors import unknown

PHANTOM: Final = "phantom"
PHANTOM_SEED = 20240
"""Independent of the recipe's seed, so that every run trains on the same embedded set."""

IMAGE_KINDS: Final = ("polyp", "skin", "vessels", "nuclei")
VOLUME_KINDS: Final = ("head", "hippocampus")

_STEMS = {"polyp": "phantom"}  # where a kind's cases have another name than the kind


def phantom_kind(root: str, kinds: tuple[str, ...]) -> str | None:
    """The kind that `root` means; None where it means a folder.

    Raises:
        UserError: `phantom:KIND` with a kind that is none of `kinds`.
    """
    if root == PHANTOM:
        return kinds[0]
    word, colon, kind = root.partition(":")
    if word != PHANTOM or not colon:
        return None
    if kind not in kinds:
        raise unknown("phantom", kind, kinds)
    return kind


def drawn_name(kind: str, index: int) -> str:
    """The name of case `index` of a kind."""
    return f"{_STEMS.get(kind, kind)}_{index:04d}"


def kind_of(name: str) -> str:
    """The kind of the drawn case `name`, whatever root's name leads it."""
    stem = name.rpartition("/")[2].rpartition("_")[0]
    return next((kind for kind, other in _STEMS.items() if other == stem), stem)


def described(root: str, kinds: tuple[str, ...]) -> str:
    """A root for report and checkpoint; that it is synthetic is said where it is."""
    return root if phantom_kind(root, kinds) is None else f"{root} (embedded, synthetic)"
