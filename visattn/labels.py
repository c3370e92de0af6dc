"""What the values in a mask file mean: names, classes, pixels to ignore, and regions that overlap.

Three kinds of numbers appear in a segmentation task, and this file is the one place that turns one into another:

* file values, as stored in a mask (0 and 255, say);
* class indices 0..K-1 in the order of the recipe, with `IGNORE` for pixels that count neither in loss nor in metrics;
* output channels of the network: one for a binary task, one per class, or one per region.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from visattn.errors import UserError, unknown

if TYPE_CHECKING:
    import torch  # takes seconds, and commands that read or score masks need none of it

IGNORE = 255
"""Class index, in encoded maps, of a pixel that is left out of loss and metrics."""

_UNKNOWN = 254  # table entry of a file value that the map does not hold; so indices run to 253
_MAX_LABELS = 254
_MAX_VALUE = 65535
_SAFE_GAP = 16  # labels at least this far apart leave room for the noise of JPEG and of soft edges

Maps = TypeVar("Maps", NDArray[Any], "torch.Tensor")


@dataclass(frozen=True)
class Labels:
    """The label map of a task. Build it with `from_config`, which checks it.

    Args:
        names: One name per class, in the order of the recipe; the first is the background.
        values: For each name, the file values that mean it; the first of them is the one that is written.
        ignore: File values of pixels that are left out of loss and metrics.
        regions: Overlapping regions, outermost first, each a name and the names of the labels that it unites.
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignore: tuple[int, ...] = ()
    regions: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def from_config(
        cls,
        labels: Mapping[str, int | list[int]],
        regions: Mapping[str, list[str]] | None = None,
        ignore: int | list[int] | None = None,
    ) -> "Labels":
        """Read the `labels`, `regions` and `ignore` blocks of a recipe.

        Raises:
            UserError: A value is no integer of 0..65535 or stands twice, there are fewer than 2 or more than 254
                labels, or a region names an unknown label, the background, or no label of its own.
        """
        if not isinstance(labels, Mapping) or not 2 <= len(labels) <= _MAX_LABELS:
            raise UserError(
                f"labels: needs 2 to {_MAX_LABELS} names with their values in the mask files, the background first, "
                f"as in {{background: 0, polyp: 255}}; got {labels!r:.120}"
            )
        owner: dict[int, str] = {}
        found: dict[str, tuple[int, ...]] = {}
        for name, value in labels.items():
            if not isinstance(name, str) or not name.strip():
                raise UserError(f"labels: the name {name!r} is no text; put it in quotes")
            found[name] = _values(f"labels: '{name}'", value)
        ignored = () if ignore is None else _values("ignore", ignore, empty=True)
        for name, numbers in [*found.items(), ("ignore", ignored)]:
            for number in numbers:
                if number in owner:
                    raise UserError(
                        f"labels: the value {number} is given to '{owner[number]}' and again to '{name}'; "
                        "each value of a mask can mean only one thing"
                    )
                owner[number] = name
        return cls(tuple(found), tuple(found.values()), ignored, _regions(regions or {}, tuple(found)))

    def to_config(self) -> dict[str, Any]:
        """The arguments of `from_config` as plain Python, fit for YAML, JSON and a checkpoint."""
        return {
            "labels": {
                name: values[0] if len(values) == 1 else list(values)
                for name, values in zip(self.names, self.values, strict=True)
            },
            "regions": {name: list(members) for name, members in self.regions},
            "ignore": list(self.ignore),
        }

    @property
    def binary(self) -> bool:
        """Whether one sigmoid channel is enough: two labels and no regions."""
        return len(self.names) == 2 and not self.regions

    @property
    def channels(self) -> int:
        """Output channels of the network: 1 if binary, else one per region, else one per class."""
        return 1 if self.binary else len(self.regions) or len(self.names)

    @property
    def activation(self) -> Literal["sigmoid", "softmax"]:
        """What turns logits into probabilities: sigmoid where channels may overlap or there is only one."""
        return "sigmoid" if self.binary or self.regions else "softmax"

    @property
    def foreground(self) -> tuple[str, ...]:
        """The names that metrics report: the regions if there are any, else all classes but the background."""
        return tuple(name for name, _ in self.regions) if self.regions else self.names[1:]

    def encode(self, array: NDArray[Any], source: str) -> NDArray[np.uint8]:
        """File values (H, W) to class indices (H, W), `IGNORE` where the file says so.

        A value matches exactly. Where all labels lie at least 16 apart, noise is forgiven too: with two values any
        value between them goes to the nearer one (JPEG masks with 0-8 and 247-255, soft edges); with more, a value
        within 8 of a label goes to it, because half-way from the first to the third label would be the second. A list
        as [255, 1] reads masks of 0 and 1 exactly, and noisy ones (a value of 16 and above that no label is) as if the
        1 were not in it.

        Args:
            array: Integers of any shape.
            source: What to call the mask in an error, usually its path.

        Raises:
            UserError: A value means nothing here, or the mask holds 0 and 1 where the labels are 0 and 255.
        """
        if array.size == 0:
            return np.zeros(array.shape, np.uint8)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > _MAX_VALUE:
            raise UserError(f"{source}: mask values run from {low} to {high}, but labels are 0..{_MAX_VALUE}")
        table = _table(self, 256 if high < 256 else _MAX_VALUE + 1)
        # Snapping would turn the 1 of a 0/1 mask into background in silence: an all-empty data set.
        if high == 1 and not self._holds(1) and _gap(self) >= _SAFE_GAP:
            raise UserError(
                f"{source}: the mask holds only 0 and 1, but labels says {self._shown()}; "
                "write the 1 into the labels block, as in {background: 0, object: 1}, "
                "or {background: 0, object: [255, 1]} where masks of both kinds lie together"
            )
        indices: NDArray[np.uint8] = table[array]
        wrong = indices == _UNKNOWN
        wide = _wide(self)
        if wide is not None and (array[wrong] >= _SAFE_GAP).any():
            indices = _table(wide, len(table))[array]
            wrong = indices == _UNKNOWN
        if wrong.any():
            values = np.unique(array[wrong])
            listed = ", ".join(str(value) for value in values[:6]) + (", ..." if len(values) > 6 else "")
            raise UserError(
                f"{source}: the mask holds {'values' if len(values) > 1 else 'the value'} {listed} "
                f"({int(wrong.sum())} pixels), which labels does not name: {self._shown()}.\n"
                "Add the value to labels (a list of values merges them) or to ignore, or correct the mask."
            )
        return indices

    def decode(self, indices: NDArray[Any]) -> NDArray[Any]:
        """Class indices to the file values that `encode` reads back, as uint8, or uint16 where a value needs it.

        Raises:
            ValueError: An index is no class, or is `IGNORE` though the recipe has no value for it.
        """
        table = np.full(256, -1, np.int64)
        table[: len(self.names)] = [values[0] for values in self.values]
        if self.ignore:
            table[IGNORE] = self.ignore[0]
        values = table[indices]
        if values.size and values.min() < 0:
            raise ValueError(f"class indices run to {int(indices.max())}, but there are {len(self.names)} classes")
        written: NDArray[Any] = values.astype(np.uint8 if table.max() < 256 else np.uint16)
        return written

    def onehot(self, indices: Maps, axis: int = 0) -> Maps:
        """The target of each output channel, as bool; all False where a pixel is ignored.

        Args:
            indices: Class indices of any shape, (H, W) or (B, H, W) say, as an array or a tensor.
            axis: Where the channel axis stands in the result: 0 gives (channels, H, W), 1 turns (B, H, W) into
                (B, channels, H, W).
        """
        maps = []
        for members in self._channel_members():
            inside = indices == members[0]
            for member in members[1:]:
                inside = inside | (indices == member)
            maps.append(inside)
        if isinstance(indices, np.ndarray):
            return np.stack(maps, axis=axis)
        import torch

        return torch.stack(maps, dim=axis)

    def from_probabilities(self, probabilities: NDArray[Any], threshold: float = 0.5) -> NDArray[np.uint8]:
        """Probabilities (channels, H, W) to class indices (H, W).

        Binary: foreground where the probability is at least `threshold`. Regions: painted outermost first, each with
        its own label (the first of its labels that no later region holds). Classes: the largest probability.
        """
        if len(probabilities) != self.channels:
            raise ValueError(f"expected {self.channels} channels, got {len(probabilities)}")
        if self.binary:
            return np.asarray(probabilities[0] >= threshold, np.uint8)
        if not self.regions:
            return np.asarray(probabilities.argmax(axis=0), np.uint8)
        indices = np.zeros(probabilities.shape[1:], np.uint8)
        for probability, own in zip(probabilities, own_labels(self.regions), strict=True):
            indices[probability >= threshold] = self.names.index(own[0])
        return indices

    def _channel_members(self) -> list[list[int]]:
        if self.binary:
            return [[1]]
        if self.regions:
            return [[self.names.index(member) for member in members] for _, members in self.regions]
        return [[index] for index in range(len(self.names))]

    def _holds(self, value: int) -> bool:
        return value in self.ignore or any(value in values for values in self.values)

    def _shown(self) -> str:
        return str(self.to_config()["labels"]) + (f", ignore {list(self.ignore)}" if self.ignore else "")


def own_labels(regions: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """For each region, the labels that no later (inner) region holds."""
    own: list[tuple[str, ...]] = []
    later: set[str] = set()
    for _, members in reversed(list(regions)):
        own.append(tuple(member for member in members if member not in later))
        later.update(members)
    return own[::-1]


def _values(where: str, value: Any, empty: bool = False) -> tuple[int, ...]:
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    if not numbers and not empty:
        raise UserError(f"{where}: the list of values is empty")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= _MAX_VALUE:
            raise UserError(f"{where}: {number!r} is no value of a mask; needs a whole number of 0..{_MAX_VALUE}")
    return tuple(numbers)


def _regions(regions: Mapping[str, list[str]], names: tuple[str, ...]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(regions, Mapping):
        raise UserError(f"regions: needs names with lists of labels, as in {{whole: [rim, core]}}; got {regions!r:.80}")
    result = []
    for region, members in regions.items():
        if not isinstance(members, list | tuple) or not members:
            raise UserError(f"regions: '{region}' needs a list of labels, got {members!r:.80}")
        for member in members:
            if member not in names:
                raise unknown(f"label in region '{region}'", str(member), names)
        if names[0] in members:
            raise UserError(f"regions: '{region}' holds the background '{names[0]}', which no region may")
        if len(set(members)) != len(members):
            raise UserError(f"regions: '{region}' names a label twice: {list(members)}")
        result.append((str(region), tuple(members)))
    for (region, united), own in zip(result, own_labels(result), strict=True):
        if not own:
            raise UserError(
                f"regions: all labels of '{region}' ({', '.join(united)}) belong to later regions as well, so no "
                "pixel could be painted with it alone; list the outermost region first and give each its own label"
            )
    return tuple(result)


def _gap(labels: Labels) -> int:
    """The smallest distance between two file values of different meaning."""
    owned = [(value, index) for index, values in enumerate(labels.values) for value in values]
    owned += [(value, -1) for value in labels.ignore]
    owned.sort()
    return min(after[0] - before[0] for before, after in pairwise(owned) if before[1] != after[1])


@lru_cache(maxsize=16)
def _wide(labels: Labels) -> Labels | None:
    """The map without its small alternatives, as 255 for [255, 1], if that leaves room for noise; else None."""
    if _gap(labels) >= _SAFE_GAP:
        return None
    large = [tuple(value for value in group if not 0 < value < _SAFE_GAP) for group in labels.values]
    values = tuple(kept or group for kept, group in zip(large, labels.values, strict=True))
    wide = replace(labels, values=values)
    return wide if _gap(wide) >= _SAFE_GAP else None


@lru_cache(maxsize=16)
def _table(labels: Labels, size: int) -> NDArray[np.uint8]:
    """Class index, `IGNORE` or unknown for every file value below `size`."""
    table = np.full(size, _UNKNOWN, np.uint8)
    values = [value for group in labels.values for value in group] + list(labels.ignore)
    indices = [index for index, group in enumerate(labels.values) for _ in group] + [IGNORE] * len(labels.ignore)
    if _gap(labels) >= _SAFE_GAP:
        numbers, ordered = np.arange(size), np.sort(values)
        above = np.searchsorted(ordered, numbers).clip(1, len(ordered) - 1)
        low, high = ordered[above - 1], ordered[above]
        nearest = np.where(numbers - low <= high - numbers, low, high)
        near = np.abs(numbers - nearest) <= _SAFE_GAP // 2
        if len(set(indices)) == 2:
            near |= (numbers >= ordered[0]) & (numbers <= ordered[-1])
        class_of = np.zeros(max(values) + 1, np.uint8)
        class_of[values] = indices
        table[near] = class_of[nearest[near]]
    for value, index in zip(values, indices, strict=True):
        if value < size:
            table[value] = index
    table.setflags(write=False)
    return table
