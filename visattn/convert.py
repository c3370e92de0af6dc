"""`visattn convert`: an author's weights file as safetensors, for `visattn.load_official` or, a backbone's, for timm.

A backbone's entries get our names, so that `timm.create_model(NAME, checkpoint_path=FILE)` reads them.

Keras numbers the layers of a kind as they are created, over all models of a session: `conv3d_37` may be the first of a
file. Here they are counted from 0 again, in the order of their numbers, and kernels are laid out as torch does.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visattn.errors import UserError, unknown
from visattn.files import write_bytes_atomic
from visattn.keras_file import KerasWeight, is_keras_file, read_keras_file
from visattn.weights import OFFICIAL, backbone_arguments, load_official, official_backbones, read_weights

_KINDS = ("conv3d", "conv3d_transpose", "batch_normalization", "pam", "cam")
_LAYER = re.compile(rf"({'|'.join(sorted(_KINDS, key=len, reverse=True))})(?:_v[12])?(?:_(\d+))?")
_STATISTICS = {"moving_mean": "running_mean", "moving_variance": "running_var"}
_FROM_KERAS = ("agunet", "daunet")


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        path: The file.
        tensors: How many entries it has.
        numbers: How many numbers.
        notes: What a user should know.
        call: The Python expression that loads it.
    """

    path: Path
    tensors: int
    numbers: int
    notes: tuple[str, ...]
    call: str


def convert_weights(source: Path | str, model: str, output: Path | str, arguments: Mapping[str, Any]) -> Converted:
    """Convert a weights file, having checked that it fits the network entry by entry.

    Args:
        source: Keras `.h5`, or `.pth` or `.safetensors` as the authors publish them.
        model: A key of `visattn.weights.OFFICIAL`, or a registered backbone that has official weights.
        output: Ends in `.safetensors`.
        arguments: Of the network, as for `visattn.create_model`, or of the backbone.

    Raises:
        UserError: The file cannot be read, or its entries are not those of the network.
    """
    source, output = Path(source), Path(output)
    backbone = model not in OFFICIAL
    if backbone and model not in official_backbones():
        raise unknown("network with official weights", model, [*OFFICIAL, *official_backbones()])
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: the name must end in .safetensors")
    if not source.is_file():
        raise UserError(f"{source}: no such file")
    if is_keras_file(source):
        if model not in _FROM_KERAS:
            raise UserError(f"{source}: Keras weights, but those of {model} are a file of torch.save or safetensors")
        tensors = from_keras(read_keras_file(source), str(source))
    else:
        tensors = read_weights(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            network = load_official(model, tensors, **arguments)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except (TypeError, ValueError, RuntimeError) as error:  # what a builder makes of a value that cannot be
            shown = ", ".join(f"{key} {value!r}" for key, value in arguments.items())
            raise UserError(f"{model} cannot be built with {shown or 'its defaults'}: {str(error)[:200]}") from None
    if backbone:
        arguments, tensors = backbone_arguments(model, tensors, arguments), network.state_dict()
    _write(source, model, output, arguments, tensors)
    listed = "".join(f", {key}={value!r}" for key, value in arguments.items())
    loading = f'"{model}", checkpoint_path="{output}"' if backbone else f'"{model}", "{output}"'
    return Converted(
        output,
        len(tensors),
        sum(value.numel() for value in tensors.values()),
        tuple(dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning)),
        f"{'timm.create_model' if backbone else 'visattn.load_official'}({loading}{listed})",
    )


def from_keras(weights: Sequence[KerasWeight], source: str) -> dict[str, Tensor]:
    """Keras weights under the names and in the layouts of `visattn.networks.agunet_weights`.

    Args:
        weights: As `read_keras_file` gives them.
        source: What to call the file in an error.

    Raises:
        UserError: A layer has a name of its own, so that its place is unknown, or two entries mean the same.
    """
    placed = [(*_place(weight, source), weight) for weight in weights]
    numbers: dict[str, list[int]] = {
        kind: sorted({number for other, number, _, _ in placed if other == kind}) for kind in _KINDS
    }
    tensors: dict[str, Tensor] = {}
    for kind, number, leaf, weight in placed:
        rank = numbers[kind].index(number)
        key = f"{kind}_{rank}.{leaf}" if rank else f"{kind}.{leaf}"
        if key in tensors:
            raise UserError(f"{source}: two layers are called {kind}{f'_{number}' if number else ''}")
        tensor = torch.from_numpy(weight.array)
        if leaf.endswith("kernel"):
            if tensor.ndim != 5:
                raise UserError(f"{source}: {weight.name} has {tensor.ndim} axes, a kernel of a volume has 5")
            tensor = tensor.permute(4, 3, 0, 1, 2)  # of a transposed convolution in and out are the other way round
        tensors[key] = tensor.contiguous()
    return tensors


def _place(weight: KerasWeight, source: str) -> tuple[str, int, str]:
    """Kind and number of the layer that a weight belongs to, and its own name."""
    first, *rest = weight.name.split("/")
    path = [weight.layer, *rest]
    if _LAYER.fullmatch(weight.layer) is None:  # the group of a model inside a model; its layers are in the name
        path = [first, *rest]
        while path and _LAYER.fullmatch(path[0]) is None:
            path = path[1:]
    match = _LAYER.fullmatch(path[0]) if path else None
    if match is None or len(path) < 2:
        raise UserError(
            f"{source}: the layer {weight.layer} is none of {', '.join(_KINDS)} with a number, "
            "so its place in the network is unknown"
        )
    kind, number = match.group(1), int(match.group(2) or 0)
    leaf = path[-1].split(":")[0].removeprefix(f"{kind}_")
    return kind, number, ".".join([*path[1:-1], _STATISTICS.get(leaf, leaf)])


def _write(source: Path, model: str, output: Path, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "format": "pt",
        "model": model,
        "arguments": json.dumps(dict(arguments)),
        "converted_from": source.name,
        "converted_from_sha256": digest,
    }
    # clone: safetensors refuses tensors that share storage
    write_bytes_atomic(output, save({key: value.contiguous().clone() for key, value in tensors.items()}, about))
