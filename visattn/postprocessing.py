"""What is done to a predicted mask before it is written or scored: small parts removed, holes filled.

A recipe lists steps; they ride in the checkpoint, and `predict`, `validate`, `test` and the scores of `fit` take the
same ones, on the voxels or pixels of the file. Parts are connected through faces, edges and corners (26 neighbours, 8
in an image); holes, which are what parts leave, through faces alone.

| step | what it does to each label by itself |
|---|---|
| `keep_largest` | keeps the largest part |
| `remove_small` | removes parts below `ml`, or below `voxels` |
| `fill_holes` | fills what the label encloses on all sides and is background |

With regions, a step works on whole regions: what is removed from one leaves the regions within it too and stays in
those around it; a hole in an inner region is filled whatever outer region it lies in.

Legend: I, J, K the axes of a volume; H, W those of an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.components import SLAB, Box, Components, Size3, bounding_box, find_components, slabs
from visattn.errors import UserError, chosen, did_you_mean, unknown
from visattn.labels import Labels, own_labels
from visattn.scratch import release

_OPTIONS: dict[str, tuple[str, ...]] = {
    "keep_largest": ("labels", "together"),
    "remove_small": ("labels", "together", "ml", "voxels"),
    "fill_holes": ("labels",),
}
"""Steps and their arguments."""

_MOST = 20  # steps; a few are ever of use


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        name: A key of the table above.
        labels: Names of classes or regions; empty: all but the background.
        together: Whether the labels count as one thing, so that the largest part may consist of several.
        ml: Volume below which a part is removed.
        voxels: The same as a number of voxels, or of an image's pixels.
    """

    name: str
    labels: tuple[str, ...] = ()
    together: bool = False
    ml: float | None = None
    voxels: int | None = None


class PostProcessing:
    """The steps of a recipe.

    Args:
        steps: In the order in which they are taken.
        labels: What the class indices mean.
    """

    def __init__(self, steps: Sequence[Step], labels: Labels) -> None:
        self.steps = tuple(steps)
        # Which class indices belong to each class or region, and the one that its voxels are painted with.
        maps = labels.onehot(np.arange(256, dtype=np.uint8))[-len(labels.foreground) :]
        self._members: dict[str, NDArray[np.bool_]] = dict(zip(labels.foreground, maps, strict=True))
        own = [names[0] for names in own_labels(labels.regions)] if labels.regions else labels.foreground
        self._own = {name: labels.names.index(label) for name, label in zip(labels.foreground, own, strict=True)}

    @classmethod
    def from_config(
        cls, config: Sequence[Mapping[str, Any] | str] | None, labels: Labels, rank: int
    ) -> "PostProcessing":
        """From a recipe's list of names, or of mappings with a name and its arguments.

        Args:
            config: The list; None: nothing is done.
            labels: What the class indices mean.
            rank: 3 for volumes, 2 for images, which have no ml.

        Raises:
            UserError: A step, an argument or a label is unknown, or a value cannot be.
        """
        steps = check_postprocessing(config)
        for number, step in enumerate(steps):
            for name in step.labels:
                if name not in labels.foreground:
                    raise unknown(f"label in model.postprocess[{number}]:", name, labels.foreground)
            if step.ml is not None and rank != 3:
                raise UserError(
                    f"model.postprocess[{number}]: ml is for volumes, an image's pixels have no size.\n"
                    "Give voxels, a number of pixels."
                )
        return cls(steps, labels)

    def to_config(self) -> list[dict[str, Any]]:
        """What `from_config` takes."""
        return [
            {key: list(value) if isinstance(value, tuple) else value for key in ("name", *_OPTIONS[step.name])
             if (value := getattr(step, key)) not in ((), None, False)}
            for step in self.steps
        ]  # fmt: skip

    def apply(self, indices: NDArray[np.uint8], voxel_ml: float | None = None, slab: int = SLAB) -> None:
        """Change class indices (I, J, K) or (H, W), in place.

        Args:
            indices: Class indices.
            voxel_ml: Volume of a voxel; needed where a step names ml.
            slab: Voxels that are looked at together; changes nothing but the memory that it takes.
        """
        volume = indices if indices.ndim == 3 else indices[:, :, None]
        for step in self.steps:
            names = step.labels or tuple(self._members)
            for group in [names] if step.together else [(name,) for name in names]:
                if step.name == "fill_holes":
                    self._fill(volume, group[0], slab)
                else:
                    self._remove(volume, group, step, voxel_ml, slab)

    def _remove(
        self, volume: NDArray[np.uint8], group: Sequence[str], step: Step, voxel_ml: float | None, slab: int
    ) -> None:
        inside = np.any([self._members[name] for name in group], axis=0)
        crop = _crop(volume, inside, slab)
        if crop is None:
            return
        part = volume[crop]
        found = find_components(partial(_read, part, inside), _size(part), voxels=slab)
        if step.name == "keep_largest":
            unwanted = np.arange(len(found.sizes)) != found.sizes.argmax()
        elif step.ml is None:
            assert step.voxels is not None
            unwanted = found.sizes < step.voxels
        else:
            assert voxel_ml is not None
            # A quotient of the rounded numbers of a header; a part of just that volume stays.
            unwanted = found.sizes * voxel_ml < step.ml * (1 - 1e-6)
        if unwanted.any():
            _replace(part, inside, found, unwanted, self._without(group))

    def _fill(self, volume: NDArray[np.uint8], name: str, slab: int) -> None:
        crop = _crop(volume, self._members[name], slab)
        # A label of a single plane encloses nothing, unless there is but one: a slice is taken for an image.
        if crop is None or any(s.stop - s.start == 1 != n for s, n in zip(crop, volume.shape, strict=True)):
            return
        part, outside = volume[crop], ~self._members[name]
        found = find_components(partial(_read, part, outside), _size(part), faces_only=True, voxels=slab)
        holes = ~found.at_border
        if holes.any():
            _replace(part, outside, found, holes, self._filled(name))

    def _without(self, group: Sequence[str]) -> NDArray[np.uint8]:
        """For each class index, what is left when its voxel leaves the labels of `group`."""
        table = np.arange(256, dtype=np.uint8)
        gone = [self._members[name] for name in group]
        for index in np.flatnonzero(np.any(gone, axis=0)):
            left = [
                name for name, inside in self._members.items()
                if inside[index] and not any((inside <= other).all() for other in gone)
            ]  # fmt: skip
            table[index] = self._own[left[-1]] if left else 0
        return table

    def _filled(self, name: str) -> NDArray[np.uint8]:
        """For each class index, what a voxel of a hole in `name` becomes: only background and what is around it do."""
        inside = self._members[name]
        beside = [other for other in self._members.values() if not (inside <= other).all()]
        table = np.arange(256, dtype=np.uint8)
        table[~inside & ~np.any([inside & False, *beside], axis=0)] = self._own[name]
        return table


def check_postprocessing(config: Sequence[Mapping[str, Any] | str] | None) -> list[Step]:
    """The steps of a recipe's list, as far as they can be checked without labels.

    Raises:
        UserError: A step or an argument is unknown, or a value cannot be.
    """
    if config is None:
        return []
    if not isinstance(config, list | tuple) or len(config) > _MOST:
        raise UserError(f"model.postprocess: needs a list of at most {_MOST} steps, as [{{name: keep_largest}}]")
    return [_step(entry, f"model.postprocess[{number}]") for number, entry in enumerate(config)]


def _step(entry: Mapping[str, Any] | str, where: str) -> Step:
    given = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: needs a name, or a mapping with a name and its arguments; got {given!r:.60}")
    name = chosen(where, given, _OPTIONS)
    for key in given:
        if key not in ("name", *_OPTIONS[name]):
            raise UserError(
                f"{where}: '{name}' has no argument '{key}'.{did_you_mean(str(key), _OPTIONS[name])}\n"
                f"It takes: {', '.join(_OPTIONS[name])}"
            )
    labels, together = given.get("labels") or [], given.get("together", False)
    ml: Any = given.get("ml")
    voxels: Any = given.get("voxels")
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"{where}: labels needs a list of names, as [tumour]; got {labels!r:.60}")
    if not isinstance(together, bool):
        raise UserError(f"{where}: together is true or false, got {together!r:.60}")
    for key, value, kinds in (("ml", ml, (int, float)), ("voxels", voxels, (int,))):
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e12):
            raise UserError(f"{where}: {key} needs a number above 0, got {value!r:.60}")
    if name == "remove_small" and (ml is None) == (voxels is None):
        raise UserError(f"{where}: 'remove_small' needs ml, as 0.1, or voxels, as 20; and not both")
    return Step(name, tuple(labels), together, ml, voxels)


def _crop(volume: NDArray[np.uint8], inside: NDArray[np.bool_], slab: int) -> Box | None:
    """The box around a label; None where there is none of it."""
    low, high = [np.iinfo(np.int64).max] * 3, [0] * 3
    for part in slabs(_size(volume), slab):
        box = bounding_box(_read(volume, inside, part))
        for axis, side in enumerate(box or ()):
            offset = part.start if axis == 2 else 0
            low[axis], high[axis] = min(low[axis], side.start + offset), max(high[axis], side.stop + offset)
    if not all(high):
        return None
    return slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2])


def _read(volume: NDArray[np.uint8], inside: NDArray[np.bool_], part: slice) -> NDArray[np.bool_]:
    mask = inside[volume[:, :, part]]
    release(volume)
    return mask


def _replace(
    volume: NDArray[np.uint8],
    inside: NDArray[np.bool_],
    found: Components,
    wanted: NDArray[np.bool_],
    table: NDArray[np.uint8],
) -> None:
    """Look up the voxels of the components that are `wanted` in `table`."""
    for held in found.held:
        if held.box is not None and wanted[held.owners].any():
            part = volume[:, :, held.part][held.box]
            chosen_voxels = found.chosen(inside[part], held, wanted)
            part[chosen_voxels] = table[part[chosen_voxels]]
            release(volume)


def _size(volume: NDArray[np.uint8]) -> Size3:
    i, j, k = volume.shape
    return i, j, k
