"""What a checkpoint says of its network, doubted: it comes from a file that anybody may have written.

Nothing in it can execute (`visattn.archives`). It could still name a model to fetch, or a width that takes all memory.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from visattn.errors import UserError

_LARGEST_ARGUMENT = 1 << 13  # a width, a depth, a size


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor of real numbers in ordinary storage: not sparse, quantised, complex or without values."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    assert isinstance(tensor, Tensor)
    strange = tensor.is_quantized or tensor.is_complex() or tensor.layout != torch.strided
    return not strange and tensor.device.type == "cpu"


def check_arguments(path: Path, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of a network that lead outside or are beyond all measure.

    Raises:
        UserError: A text is an address, or a whole number is too large.
    """
    for key, value in _leaves(arguments, ""):
        if isinstance(value, int) and abs(value) > _LARGEST_ARGUMENT:
            raise UserError(f"{path}: the network's {key} is {value!r:.40}, which is too large.\nDo not use this file.")
        # timm takes hf-hub: and local-dir: names and fetches them, even without pretrained weights.
        if isinstance(value, str) and any(mark in value for mark in ":/\\"):
            raise UserError(
                f"{path}: the network's {key} is {value!r:.200}, an outside address: refused.\nDo not use this file."
            )


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The plain values in nested mappings and lists, each with its place."""
    if isinstance(value, Mapping | list):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(item, f"{where}.{key}" if where else str(key))
    else:
        yield where, value


@contextmanager
def no_larger_than(weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Stop building a network that outgrows its weights by far, before its tensors take memory.

    Raises:
        UserError: It does.
    """
    room = 2 * sum(value.numel() for value in weights.values()) + 2**25  # a backbone's classifier is built and dropped
    tensors = 10 * len(weights) + 1000

    def count(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal room, tensors
        room -= 0 if parameter is None else parameter.numel()
        tensors -= 1
        if room < 0 or tensors < 0:
            raise UserError("the network that it describes is far larger than its weights.\nDo not use this file.")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are no numbers: every mask would be empty.

    Raises:
        UserError: Some are NaN or infinite.
    """
    spoilt = [k for k, v in weights.items() if v.is_floating_point() and not bool(torch.isfinite(v.float()).all())]
    if spoilt:
        raise UserError(
            f"{len(spoilt)} of its weights hold NaN or infinite values (first: {spoilt[0]}): the training diverged, "
            "or the file is damaged.\nUse another checkpoint."
        )
