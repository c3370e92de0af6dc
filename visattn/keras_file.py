"""Keras's weight files, `.h5`, read as data: layer names and arrays. Keras itself is not needed.

What `save_weights` and `save` of Keras 2 (and `save` of Keras 3 into `.h5`) write: a group for each layer, named in the
attribute `layer_names` of the root or of its group `model_weights`; in each group the attribute `weight_names` and a
dataset for each of these names. Long attributes are split: `weight_names0`, `weight_names1`, ...

A file from elsewhere is not trusted: links are not followed, nothing is read from other files or through filters that
HDF5 would load as a program, and no array is larger than what the file can hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visattn.errors import UserError

SIGNATURE = b"\x89HDF\r\n\x1a\n"

_MAX_BYTES = 8 * 2**30
_MAX_NAMES = 100_000
_MAX_NAME = 1000  # bytes
_EXPANSION = 1040  # deflate cannot do better than 1032:1
_FILTERS = (1, 2, 3, 32000)  # deflate, shuffle, checksum, lzf: h5py's own


@dataclass(frozen=True, eq=False)
class KerasWeight:
    """One array of a layer.

    Args:
        layer: Name of the group of the layer, as `conv3d_4`.
        name: Name of the weight as Keras gives it, as `conv3d_4/kernel:0`.
        array: Its values.
    """

    layer: str
    name: str
    array: NDArray[np.float32]


def is_keras_file(path: Path) -> bool:
    """Whether the file begins as HDF5 does."""
    with path.open("rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE


def read_keras_file(path: Path) -> list[KerasWeight]:
    """All weights of all layers, in the order of the file.

    Raises:
        UserError: h5py is missing, the file is damaged, is no Keras file of this kind, or holds what no weights need.
    """
    h5py = _h5py()
    try:
        with h5py.File(path, "r", locking=False) as file:
            return list(_weights(h5py, path, file))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:  # what h5py makes of damaged bytes
        raise UserError(f"{path}: truncated or damaged HDF5 file ({str(error)[:80]}); copy it again") from None


def _weights(h5py: ModuleType, path: Path, file: Any) -> Iterator[KerasWeight]:
    root = file
    if _names(h5py, root, "layer_names") is None and "model_weights" in root:
        root = _child(h5py, root, "model_weights")
    layers = _names(h5py, root, "layer_names")
    if layers is None:
        new = "_layer_checkpoint_dependencies" in file or "layers" in file
        raise UserError(
            "a weights file of Keras 3, which keeps no layer names as older ones do; in Keras, load it and "
            "save the model as NAME.h5"
            if new
            else "no Keras weights: it has no layer_names (groups and attributes as save_weights writes them)"
        )
    left = min(_MAX_BYTES, path.stat().st_size * _EXPANSION)
    for layer in layers:
        group = _child(h5py, root, layer)
        for name in _names(h5py, group, "weight_names") or ():
            dataset = group
            for part in name.split("/"):
                dataset = _child(h5py, dataset, part)
            array = _array(h5py, dataset, name, left)
            left -= array.nbytes
            yield KerasWeight(layer, name, array)


def _child(h5py: ModuleType, group: Any, name: str) -> Any:
    """The member `name` of a group; it is in the file itself."""
    if not isinstance(group, h5py.Group) or not name or name in (".", "..") or "/" in name:
        raise UserError(f"damaged: {name[:80]!r} has no place in it")
    link = group.get(name, getlink=True)
    if link is None:
        raise UserError(f"incomplete: {name[:80]} is named, but is not there")
    if not isinstance(link, h5py.HardLink):
        raise UserError(
            f"{name[:80]} is a link ({type(link).__name__}), which is not followed; weights are in the file"
        )
    return group[name]


def _array(h5py: ModuleType, dataset: Any, name: str, left: int) -> NDArray[np.float32]:
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"damaged: {name[:80]} is no array")
    kind = dataset.dtype
    if kind.kind != "f" or kind.itemsize not in (2, 4, 8):
        raise UserError(f"{name[:80]} holds {kind}, but weights are floating-point numbers")
    if dataset.is_virtual or dataset.external:
        raise UserError(f"{name[:80]} keeps its values in another file, which is not read")
    plan = dataset.id.get_create_plist()
    odd = [code for code in (plan.get_filter(i)[0] for i in range(plan.get_nfilters())) if code not in _FILTERS]
    if odd:
        raise UserError(f"{name[:80]} is compressed by the filter {odd[0]}, for which HDF5 would load a program")
    size = int(np.prod(dataset.shape, dtype=object))
    if size * max(4, kind.itemsize) > left or size * kind.itemsize > dataset.id.get_storage_size() * _EXPANSION:
        raise UserError(f"{name[:80]} announces {size} numbers, more than the file can hold")
    array = np.asarray(dataset[()], np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{name[:80]} holds NaN or infinities")
    return array


def _names(h5py: ModuleType, owner: Any, attribute: str) -> list[str] | None:
    """The texts of an attribute, put together where it is split; None where there is none."""
    parts = [attribute] if attribute in owner.attrs else []
    while not parts or parts[0] != attribute:
        if f"{attribute}{len(parts)}" not in owner.attrs or len(parts) > _MAX_NAMES:
            break
        parts.append(f"{attribute}{len(parts)}")
    if not parts:
        return None
    names: list[str] = []
    for part in parts:
        found = h5py.h5a.open(owner.id, part.encode())
        text = found.dtype.kind == "S" or h5py.check_string_dtype(found.dtype) is not None
        empty = 0 in found.shape  # Keras writes no weights as an empty list of numbers
        if not (text or empty) or len(found.shape) != 1 or found.shape[0] + len(names) > _MAX_NAMES:
            raise UserError(f"damaged: its attribute {part} is no list of names")
        values = [] if empty else [v.encode() if isinstance(v, str) else bytes(v) for v in owner.attrs[part]]
        if any(len(value) > _MAX_NAME for value in values):
            raise UserError(f"damaged: its attribute {part} holds a name of more than {_MAX_NAME} bytes")
        names += [value.decode("utf-8", "replace") for value in values]
    return names


def _h5py() -> ModuleType:
    try:
        import h5py
    except ImportError:
        raise UserError("Keras's .h5 files need h5py: pip install 'visattn[keras]'") from None
    return h5py  # type: ignore[no-any-return]
