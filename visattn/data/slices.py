"""How a network for images is to see a volume: slice by slice, if its recipe says along which axis.

Only who trained the network knows which slices its images were and how their grey values were made; so nothing is
assumed. Slices are turned as radiologists look at them, the patient's right on the left: columns run from right to left
and rows from anterior to posterior (axial) or superior to inferior (coronal); sagittal ones have anterior on the left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visattn.errors import UserError, unknown

ORIENTATIONS = {"axial": "SPL", "coronal": "AIL", "sagittal": "LIP"}
"""Name of the slices to the directions of slices, rows and columns."""


@dataclass(frozen=True)
class Slices:
    """How volumes are cut.

    Args:
        axis: `axial`, `coronal` or `sagittal`.
        window: Values that become 0 and 255, what lies beyond is clipped; None: the percentiles 0.5 and 99.5 of each
            volume.
    """

    axis: str
    window: tuple[float, float] | None = None

    @classmethod
    def from_config(cls, config: Any) -> "Slices | None":
        """Read a recipe's name of an axis, or a mapping with `axis` and `window`.

        Raises:
            UserError: A name or value cannot be.
        """
        if config is None:
            return None
        given = {"axis": config} if isinstance(config, str) else config
        if not isinstance(given, Mapping) or "axis" not in given:
            raise UserError(
                f"data.slices: needs a name, as axial, or {{axis: axial, window: [0, 80]}}; got {given!r:.60}"
            )
        for key in given:
            if key not in ("axis", "window"):
                raise unknown("key of data.slices", str(key), ("axis", "window"))
        if given["axis"] not in ORIENTATIONS:
            raise unknown("axis in data.slices:", str(given["axis"]), ORIENTATIONS)
        window = given.get("window")
        if window is None:
            return cls(str(given["axis"]))
        numbers = list(window) if isinstance(window, list | tuple) else []
        if len(numbers) != 2 or not all(type(n) in (int, float) and abs(n) < 1e9 for n in numbers):
            raise UserError(
                f"data.slices: window needs the values of black and white, as [-20, 120]; got {window!r:.60}"
            )
        low, high = float(numbers[0]), float(numbers[1])
        if not low < high:
            raise UserError(f"data.slices: window needs two rising values, got {window!r:.60}")
        return cls(str(given["axis"]), (low, high))

    def to_config(self) -> dict[str, Any]:
        """What `from_config` takes."""
        return {"axis": self.axis, "window": None if self.window is None else list(self.window)}
