"""What the outputs of a classifier mean: the names of its classes, and whether a case may have several of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from visattn.errors import UserError

MOST_CLASSES = 100_000


@dataclass(frozen=True)
class ClassLabels:
    """The classes of a classification. Build it with `from_config`, which checks it.

    Args:
        names: One name per output of the network.
        multi_label: Whether a case has any number of the classes, also none; else it has exactly one.
    """

    names: tuple[str, ...]
    multi_label: bool = False

    @classmethod
    def from_config(cls, classes: Sequence[str], multi_label: bool = False) -> "ClassLabels":
        """Read names.

        Raises:
            UserError: A name is no text or stands twice, or there are too few or too many.
        """
        least = 1 if multi_label else 2
        if isinstance(classes, str) or not isinstance(classes, Sequence) or not least <= len(classes) <= MOST_CLASSES:
            raise UserError(f"labels: needs a list of at least {least} names of classes, got {classes!r:.120}")
        for name in classes:
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"labels: the name {name!r:.60} is no text; put it in quotes")
            if multi_label and "|" in name:
                raise UserError(f"labels: the name {name!r:.60} holds the | that stands between several labels")
        twice = next((name for name in classes if list(classes).count(name) > 1), None) if len(classes) < 1000 else None
        if twice is not None or len(set(classes)) < len(classes):
            raise UserError(f"labels: a name stands twice{'' if twice is None else f': {twice!r:.60}'}")
        if not isinstance(multi_label, bool):
            raise UserError(f"labels: multi_label must be true or false, got {multi_label!r:.60}")
        return cls(tuple(classes), multi_label)

    def to_config(self) -> dict[str, Any]:
        """The arguments of `from_config` as plain Python, fit for JSON and a checkpoint."""
        return {"classes": list(self.names), "multi_label": self.multi_label}

    @property
    def channels(self) -> int:
        """Outputs of the network: one per class, also where there are two."""
        return len(self.names)

    @property
    def activation(self) -> Literal["sigmoid", "softmax"]:
        """What turns logits into probabilities."""
        return "sigmoid" if self.multi_label else "softmax"

    @property
    def binary(self) -> bool:
        """Whether a case has one of two classes."""
        return len(self.names) == 2 and not self.multi_label
