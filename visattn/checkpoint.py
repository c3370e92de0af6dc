"""The checkpoint format: what a trained network needs in order to be used again, and nothing that can execute.

A checkpoint is a Lightning `.ckpt` whose entry `visattn` describes the weights completely: recipe, labels,
preprocessing, network, versions. It holds tensors and plain Python values only, so it is always read with
`torch.load(weights_only=True)`. `export_weights` writes the same thing as `.safetensors` with a `.json` beside it;
`read_checkpoint` accepts both. The writer that Lightning uses is in `visattn.checkpoint_io`.

Status: format 1. A reader refuses every other number, so a change that an old reader would misread needs a new one.
"""

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visattn.archives import PLAIN, check_saved
from visattn.distrust import check_arguments, check_finite, is_plain, no_larger_than
from visattn.errors import UserError, nearest
from visattn.files import read_small, write_bytes_atomic, write_text_atomic
from visattn.folds_file import has_folds, read_folds
from visattn.versions import library_versions

FORMAT = 1
KEY = "visattn"  # the entry of the .ckpt that is ours; all others belong to Lightning
PREFIX = "network."  # SegmentationTask.network: where the network's weights lie in a Lightning state dict
LIBRARIES = ("visattn", "torch", "lightning", "timm", "numpy")

_TYPES: dict[str, type] = {
    "task": str,
    "recipe": dict,
    "labels": dict,
    "preprocessing": dict,
    "network": dict,
    "versions": dict,
    "data": dict,
    "postprocessing": dict,
}
_MAX_VALUES = 100_000  # a metadata entry is a few hundred values; a crafted one can unfold a few bytes into billions
_MAX_DEPTH = 50
_MAX_DESCRIPTION = 20_000_000  # bytes of the .json beside exported weights


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's content, checked for completeness.

    Attributes:
        path: the file it came from.
        sha256: hash of that file (for `.safetensors`, of the weights and the metadata together).
        task: what the network does, as `segmentation`.
        recipe: the resolved recipe.
        labels: what `Labels.from_config` takes.
        preprocessing: what `Preprocessing.from_config` takes.
        network: arguments of `create_model`, with its `name`.
        versions: of the libraries that wrote it.
        data: `description` and `fingerprint` of the training data.
        postprocessing: `threshold` of binary and region outputs; `steps` of `PostProcessing.from_config`, if any.
        state_dict: the network's weights, on the CPU, without Lightning's prefix.
    """

    path: Path
    sha256: str
    task: str
    recipe: dict[str, Any]
    labels: dict[str, Any]
    preprocessing: dict[str, Any]
    network: dict[str, Any]
    versions: dict[str, Any]
    data: dict[str, Any]
    postprocessing: dict[str, Any]
    state_dict: dict[str, Tensor]

    @property
    def metadata(self) -> dict[str, Any]:
        """The entry that describes the weights, as it is written to a checkpoint."""
        return {"format": FORMAT} | {key: getattr(self, key) for key in _TYPES}


def checkpoint_metadata(
    *,
    recipe: Mapping[str, Any],
    labels: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    network: Mapping[str, Any],
    data: Mapping[str, Any],
    task: str = "segmentation",
    threshold: float = 0.5,
    steps: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What a writer stores as `checkpoint[KEY]`: the description of the weights, in plain Python.

    Args:
        recipe: the resolved recipe.
        labels: `Labels.to_config()`.
        preprocessing: `Preprocessing.to_config()`.
        network: arguments of `create_model` with `name`, `in_channels` and `classes`; `pretrained` is set to false,
            since the weights ride along.
        data: `description` and `fingerprint`.
        task: what the network does.
        threshold: probability from which a binary or region output is foreground.
        steps: `PostProcessing.to_config()`.

    Raises:
        TypeError: a value is not plain (its key is named). Tuples become lists and str subclasses become str, because
            `weights_only=True` refuses classes.
    """
    entry = {
        "task": task,
        "recipe": recipe,
        "labels": labels,
        "preprocessing": preprocessing,
        "network": {**network, "pretrained": False},
        "versions": library_versions(LIBRARIES),
        "data": data,
        "postprocessing": {"threshold": threshold} | ({"steps": steps} if steps else {}),
    }
    result = plain(entry, KEY)
    assert isinstance(result, dict)
    return {"format": FORMAT} | result


def plain(value: object, where: str) -> Any:
    """A copy of `value` made of dict, list, str, int, float, bool and None alone.

    Raises:
        TypeError: something else is inside, a key is not text, or it unfolds to more than any recipe holds.
    """
    seen = 0

    def copy(value: object, where: str, depth: int) -> object:
        nonlocal seen
        seen += 1
        if seen > _MAX_VALUES or depth > _MAX_DEPTH:
            raise TypeError(f"{where}: too large or too deep")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise TypeError(f"{where}: the key {key!r} is not text")
            return {str(key): copy(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        for kind in (str, int, float):  # the constructor strips subclasses: TorchVersion, enumerations, numpy.float64
            if isinstance(value, kind):
                return kind(value)
        raise TypeError(f"{where}: a {type(value).__name__} is not a plain value")

    return copy(value, where, 0)


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint file that `path` means: itself, or `checkpoints/best.ckpt` where it is a run folder.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        best = path / "checkpoints" / "best.ckpt"
        if best.is_file():
            return best
        if has_folds(path):
            raise UserError(
                f"{path}: a run with {read_folds(path).count} folds, not one checkpoint.\n"
                "Give the run folder of one fold, such as its fold-0; predict and visattn.load take all folds together."
            )
        raise UserError(
            f"{path}: a folder, not a checkpoint.\nGive a .ckpt or .safetensors file, or a run folder that holds "
            "checkpoints/best.ckpt."
        )
    beside = (
        [p.name for p in path.parent.iterdir() if p.suffix in {".ckpt", ".safetensors"}] if path.parent.is_dir() else []
    )
    guess = nearest(path.name, beside)
    hint = f"Did you mean {path.parent / guess}?" if guess else "A run keeps its own in checkpoints/best.ckpt."
    raise UserError(f"{path}: no such checkpoint.\n{hint}")


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint without executing anything in it.

    Args:
        path: a `.ckpt` written by `visattn fit`, a `.safetensors` with its `.json` from `visattn export-weights`, or a
            run folder (its best checkpoint).

    Raises:
        UserError: missing, truncated, damaged, another tool's, another format version, incomplete, or holding Python
            objects that could execute. The message names the file and what to do.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        entry, weights, sha256 = _read_exported(path)
    else:
        content = load_plain(path)
        if not isinstance(content, dict) or KEY not in content:
            raise UserError(
                f"{path}: not a visattn checkpoint (it has no '{KEY}' entry); perhaps another tool wrote it.\n"
                "Official weights are taken by visattn.load_official, a backbone's by the recipe's pretrained: PATH."
            )
        state = content.get("state_dict")
        if not isinstance(state, dict):
            raise UserError(f"{path}: damaged checkpoint: no 'state_dict'.\nUse another checkpoint of the same run.")
        weights = {k.removeprefix(PREFIX): v for k, v in state.items() if isinstance(k, str) and k.startswith(PREFIX)}
        entry, sha256 = content[KEY], _hash(path)
    fields = _check_entry(path, entry)
    size = path.stat().st_size
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path}: damaged checkpoint: no network weights in it.\nUse another checkpoint of the run.")
    odd = [key for key, value in weights.items() if not is_plain(value)]
    if odd:
        raise UserError(f"{path}: damaged checkpoint: {odd[0]!r:.120} is no plain tensor of numbers.\nDo not use it.")
    if sum(value.numel() * value.element_size() for value in weights.values()) > size:
        # Tensors that share or repeat a small storage could claim any amount of memory.
        raise UserError(f"{path}: damaged checkpoint: its weights claim more bytes than the file has.\nDo not use it.")
    return Checkpoint(path=path, sha256=sha256, state_dict=weights, **fields)


def _check_entry(path: Path, entry: object) -> dict[str, Any]:
    """The fields of a `visattn` entry, or the error that says what is wrong with it."""
    if not isinstance(entry, dict) or type(entry.get("format")) is not int:
        raise UserError(f"{path}: damaged checkpoint: no format number.\nUse another checkpoint of the same run.")
    if entry["format"] > FORMAT:
        raise UserError(
            f"{path}: written by a newer visattn (checkpoint format {entry['format']}; this one reads {FORMAT}).\n"
            "Upgrade: pip install --upgrade visattn"
        )
    if entry["format"] != FORMAT:
        raise UserError(f"{path}: checkpoint format {entry['format']} is not known; this visattn reads {FORMAT}.")
    for key, kind in _TYPES.items():
        if not isinstance(entry.get(key), kind):
            problem = f"'{key}' is not a {kind.__name__}" if key in entry else f"'{key}' is missing"
            raise UserError(
                f"{path}: incomplete checkpoint: {problem}.\nUse another checkpoint of the same run, or train again."
            )
    try:
        fields: dict[str, Any] = plain({key: entry[key] for key in _TYPES}, KEY)
    except TypeError as error:
        raise UserError(f"{path}: damaged checkpoint: {error}.\nUse another checkpoint of the same run.") from error
    return fields


def load_plain(path: Path, map_location: Any = "cpu") -> Any:
    """`torch.load(weights_only=True)` with its errors in words, after the checks of `visattn.archives`.

    Raises:
        UserError: truncated, damaged, in the old format of torch, or holding objects that could execute.
    """
    damaged = f"{path}: truncated or damaged.\nUse another checkpoint of the same run, or copy the file again."
    try:
        with path.open("rb") as handle:
            start = handle.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from error
    if not start:
        raise UserError(f"{path}: an empty file.\nUse another checkpoint of the same run, or copy the file again.")
    if start != b"PK\x03\x04":
        raise UserError(
            f"{path}: not a visattn checkpoint (nor any file of today's torch.save).\n"
            "Give the .ckpt of a run, or the .safetensors of visattn export-weights."
        )
    try:
        check_saved(path, PLAIN)
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds Python objects, which could execute code when loaded: refused.\n"
            "visattn reads tensors and plain values only. Do not use this file unless you know who made it."
        ) from error
    except (UserError, OSError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: cannot be read: {error}") from error
    except Exception as error:  # whatever torch's reader makes of damaged bytes
        raise UserError(damaged) from error


def build_network(checkpoint: Checkpoint) -> nn.Module:
    """The network with the checkpoint's weights, on the CPU, in eval mode.

    Raises:
        UserError: the network is not known here, or the weights are not its own.
    """
    # Here, not above: reading a checkpoint needs no network, and networks import timm.
    from visattn.networks import create_model
    from visattn.networks.classifier import create_classifier

    arguments = dict(checkpoint.network) | {"pretrained": False}
    name = arguments.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{checkpoint.path}: incomplete checkpoint: 'network.name' is missing.\nUse another one.")
    check_arguments(checkpoint.path, arguments)
    try:
        with no_larger_than(checkpoint.state_dict):
            create = create_classifier if checkpoint.task == "classification" else create_model
            network: nn.Module = create(name, **arguments)
        wanted, given = network.state_dict(), checkpoint.state_dict
        missing = sorted(wanted.keys() - given.keys())
        extra = sorted(given.keys() - wanted.keys())
        shapes = sorted(k for k in wanted.keys() & given.keys() if wanted[k].shape != given[k].shape)
        if missing or extra or shapes:
            first = (missing or extra or shapes)[0]
            raise UserError(
                f"the weights are not those of this network: {len(missing)} missing, {len(extra)} unknown, "
                f"{len(shapes)} of another shape (first: {first}).\n"
                "Use another checkpoint of the same run, or the visattn version that wrote it "
                f"({checkpoint.versions.get('visattn', 'unknown')})."
            )
        check_finite(given)
        network.load_state_dict(given)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{checkpoint.path}: its network cannot be built ({type(error).__name__}: {first[:200]}).\n"
            "Use another checkpoint of the same run."
        ) from error
    return network.eval()


def export_weights(checkpoint: Path | str, output: Path | str) -> tuple[Path, Path]:
    """Write the network's weights as `.safetensors` and their description as `.json` beside it.

    `read_checkpoint` and `visattn.load` take the result; other tools read both files without visattn.

    Args:
        checkpoint: what `read_checkpoint` takes.
        output: a path that ends in `.safetensors`. Existing files are replaced.

    Returns:
        The two files written.

    Raises:
        UserError: `output` has another ending, or the checkpoint cannot be read.
    """
    from safetensors.torch import save

    output = Path(output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the name must end in .safetensors (a .json is written beside it).")
    content = read_checkpoint(checkpoint)
    # clone: safetensors refuses tensors that share storage
    data = save({k: v.contiguous().clone() for k, v in content.state_dict.items()}, {"format": "pt"})
    description = content.metadata | {"weights_sha256": hashlib.sha256(data).hexdigest()}
    write_bytes_atomic(output, data)
    beside = output.with_suffix(".json")
    write_text_atomic(beside, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    return output, beside


def _read_exported(path: Path) -> tuple[object, dict[str, Tensor], str]:
    """The entry, the weights and the joint hash of a pair of files that `export_weights` wrote."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    beside = path.with_suffix(".json")
    try:
        text = read_small(beside, _MAX_DESCRIPTION)
        entry = json.loads(text)
    except FileNotFoundError:
        raise UserError(
            f"{path}: its description {beside.name} is not beside it.\nKeep the two files together."
        ) from None
    except OSError as error:
        raise UserError(f"{beside}: cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{beside}: damaged: not JSON.\nRun visattn export-weights again.") from error
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        weights = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: truncated or damaged.\nRun visattn export-weights again, or copy it again."
        ) from error
    if not isinstance(entry, dict) or entry.pop("weights_sha256", None) != sha256:
        raise UserError(
            f"{path}: {beside.name} describes other weights (the checksums differ).\n"
            "Keep the two files of one visattn export-weights together."
        )
    return entry, weights, hashlib.sha256(data + text).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
