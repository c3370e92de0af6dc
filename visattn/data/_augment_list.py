"""Reading a recipe's `augment` list, for images and volumes alike: names, keys and values are checked."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from visattn.errors import UserError, chosen, unknown
from visattn.labels import Labels

Entry = TypeVar("Entry")


def read_entries(
    config: Sequence[str | Mapping[str, Any]] | None, table: Mapping[str, type[Entry]], kind: str
) -> list[Entry]:
    """Names, or mappings with a `name` and the arguments of that augmentation, to entries of `table`.

    Raises:
        UserError: An entry has an unknown name or key, or a value out of its range.
    """
    entries: list[Entry] = []
    for item in config or ():
        values = {"name": item} if isinstance(item, str) else dict(item) if isinstance(item, Mapping) else {}
        if not values:
            raise UserError(f"augment: an entry needs a name, as in {{name: affine, rotate: 90}}; got {item!r:.100}")
        name = chosen(kind, values, table)
        del values["name"]
        known = inspect.signature(table[name]).parameters
        for key in values:
            if key not in known:
                raise unknown(f"key of augment '{name}'", str(key), known)
        check(name, "p", values.get("p", 0.5), 0, 1)
        entries.append(table[name](**values))
    return entries


def swap_table(pairs: Sequence[Sequence[str]], labels: Labels) -> NDArray[np.uint8] | None:
    """The class index that each one becomes when the labels of each pair change places; None without pairs."""
    if not pairs:
        return None
    table = np.arange(256, dtype=np.uint8)
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise UserError(f"augment: swap_labels needs pairs, as in [[left_lung, right_lung]]; got {pairs!r:.80}")
    for pair in pairs:
        for name in pair:
            if name not in labels.names:
                raise unknown("label in swap_labels", str(name), labels.names)
        first, second = (labels.names.index(name) for name in pair)
        table[[first, second]] = table[[second, first]]
    return table


def check(name: str, key: str, value: Any, low: float, high: float, whole: bool = False) -> None:
    """Refuse a value that is no number of `low` to `high`."""
    kinds = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise UserError(f"augment: {name}.{key} must be a {kind} of {low}..{high}, got {value!r:.60}")


def check_pair(name: str, key: str, value: Any, low: float, high: float) -> None:
    """Refuse a value that is not a smallest and a largest number of `low` to `high`."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise UserError(f"augment: {name}.{key} must be two numbers, smallest and largest, got {value!r:.60}")
    for number in value:
        check(name, key, number, low, high)
    if value[0] > value[1]:
        raise UserError(f"augment: {name}.{key} runs from {value[0]} down to {value[1]}; put the smaller number first")
