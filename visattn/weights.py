"""Weights from elsewhere: files read without executing anything, official checkpoints taken over by name.

Every file is read as tensors and plain values only (safetensors, or torch.load with weights_only=True); of a few named
classes that authors save beside them, a stand-in is made that keeps nothing. An official state dict is matched key by
key: each of its entries is used or known to be unused, and each of ours is set.
"""

import importlib
import logging
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from visattn.archives import FOREIGN, check_saved
from visattn.errors import UserError, unknown

_logger = logging.getLogger(__name__)

OFFICIAL = {
    "agunet": "visattn.networks.agunet_weights",
    "att_swin_unet": "visattn.networks.att_swin_unet",
    "daunet": "visattn.networks.agunet_weights",
    "pranet": "visattn.networks.pranet",
}
"""Networks whose authors' checkpoints can be loaded, each with the module whose `from_official` does it.

Modules are named, not imported, because networks themselves import this file to read their backbones' weights.
"""

_FORMATS = (struct.error, zipfile.BadZipFile)  # what readers of binary formats raise besides
# In this order: where a file holds weights and their moving average, the weights are taken.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "model_ema", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.")  # left by DataParallel and torch.compile


class _Unread:
    """Stands for an object beside the weights; takes whatever it is made of and keeps nothing."""

    def __init__(self, *_parts: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _UnreadTable:
    """The same for a subclass of dict, which torch fills only if it is one of Python's own."""

    def __new__(cls, *_parts: Any) -> Any:
        return OrderedDict()


_BESIDE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Unread, "argparse.Namespace"),
    (_UnreadTable, "yacs.config.CfgNode"),
    (_Unread, "numpy.core.multiarray.scalar"),
    (_Unread, "numpy._core.multiarray.scalar"),
    (_Unread, "numpy.dtype"),
]
"""What authors save beside weights, settings and scores: their names, and what is made in their place."""


def load_official(name: str, state_dict: Mapping[str, Any] | str | Path, **kwargs: Any) -> nn.Module:
    """A network with its authors' weights, in eval mode.

    Args:
        name: A key of `OFFICIAL`, or a registered backbone (`va_...`) that has official weights.
        state_dict: The authors' state dict, also wrapped as `{"state_dict": ...}`, `{"model": ...}` or, if it is all
            there is, `{"model_ema": ...}`, or with every key under `module.`; or the path of a file that holds it.
        kwargs: Arguments of the network, as for `visattn.create_model`, or of the backbone, as for `timm.create_model`.
            With `num_classes=0` or `features_only=True` the classifier in the checkpoint is left out.

    Raises:
        UserError: An entry is missing, unexpected or of another shape; the message names it.
    """
    if name not in OFFICIAL:
        families = official_backbones()
        if name not in families:
            raise unknown("network with official weights", name, [*OFFICIAL, *families])
    tensors = read_weights(state_dict) if isinstance(state_dict, str | Path) else unwrap(state_dict)
    if name in OFFICIAL:
        network: nn.Module = importlib.import_module(OFFICIAL[name]).from_official(name, tensors, **kwargs)
        return network.eval()
    return _official_backbone(name, families[name], tensors, backbone_arguments(name, tensors, kwargs)).eval()


def backbone_arguments(name: str, official: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """What rebuilds the backbone `name` for a checkpoint: what its entries tell, overruled by what is `given`."""
    family: Any = official_backbones()[name]
    found = _classes(family, official)
    if hasattr(family, "arguments"):
        found |= family.arguments(official)
    return {**found, **given}


def _classes(family: Any, official: Mapping[str, Tensor]) -> dict[str, Any]:
    """`num_classes` as the classifier in a checkpoint has it; nothing if there is none."""
    weight = official.get(family.official_name("head.fc.weight"))
    return {} if weight is None or weight.ndim == 0 else {"num_classes": len(weight)}


def official_backbones() -> dict[str, ModuleType]:
    """The registered backbones that have official weights, with their families."""
    from visattn.backbones import FAMILIES

    return {name: module for name, module in FAMILIES.items() if hasattr(module, "official_name")}


def _official_backbone(name: str, family: Any, official: dict[str, Tensor], kwargs: dict[str, Any]) -> nn.Module:
    """The backbone `name` with the authors' weights.

    A family's module holds `official_name(key)`: our key to the authors'; `unused(model)`: their entries that no output
    depends on, with shapes; and, where tensors are stored in another form, `translate(official, model)`: the same keys
    with tensors in our form. `arguments(official)`, where there is one, tells what the checkpoint's entries say about
    the constructor's arguments; see `backbone_arguments`.
    """
    import timm

    model = timm.create_model(name, pretrained=False, **kwargs)
    net: nn.Module = model.model if kwargs.get("features_only") else model  # type: ignore[assignment]
    unused = dict(family.unused(net))
    if kwargs.get("features_only") or kwargs.get("num_classes") == 0:
        # What a model of maps leaves out, its head and the stages behind the last map, the checkpoint may hold; and so
        # the classifier that a model without classes leaves out.
        arguments = {key: value for key, value in kwargs.items() if key not in ("features_only", "out_indices")}
        arguments |= _classes(family, official)
        with torch.device("meta"):
            whole = timm.create_model(name, pretrained=False, **arguments)
        own = net.state_dict()
        left = {family.official_name(k): tuple(v.shape) for k, v in whole.state_dict().items() if k not in own}
        unused = {**left, **dict(family.unused(whole)), **unused}
    if hasattr(family, "translate"):
        official = family.translate(official, net)
    load_renamed(net, official, family.official_name, unused, f"{name}")
    return model


def load_renamed(
    network: nn.Module,
    official: Mapping[str, Tensor],
    official_name: Callable[[str], str],
    unused: Mapping[str, tuple[int, ...]],
    source: str,
) -> None:
    """Copy an official state dict into `network`, by name, completely.

    Only the counters `num_batches_tracked` may be absent: no output depends on them, and old checkpoints lack them.

    Args:
        network: Receives the weights in place; unchanged if an error is raised.
        official: The authors' state dict.
        official_name: Our key to the official one.
        unused: Official entries that the authors' forward pass never reads, with their shapes. They may be absent, and
            are dropped.
        source: What to call the checkpoint in an error.

    Raises:
        UserError: An entry is missing, unexpected or of another shape; official names are given.
    """
    own = network.state_dict()
    wanted = {official_name(key): key for key in own}
    if len(wanted) != len(own):
        raise ValueError(f"{source}: two of our entries have the same official name")
    shapes = {name: tuple(own[key].shape) for name, key in wanted.items()} | dict(unused)
    missing = [key for key in wanted if key not in official and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in official if key not in shapes]
    wrong = [
        f"{key} is {tuple(value.shape)}, expected {shapes[key]}"
        for key, value in official.items()
        if key in shapes and tuple(value.shape) != shapes[key]
    ]
    wrong += [
        f"{name} holds {official[name].dtype}, expected {own[key].dtype}"
        for name, key in wanted.items()
        if name in official and official[name].is_floating_point() != own[key].is_floating_point()
    ]
    problems = [
        f"{title}: {', '.join(keys[:3])}{f', ... ({len(keys)} in all)' if len(keys) > 3 else ''}"
        for title, keys in (("missing", missing), ("unexpected", unexpected), ("wrong", wrong))
        if keys
    ]
    if problems:
        advice = "Give the authors' checkpoint, whole."
        if missing and official.keys() == own.keys():
            advice = (
                "Its names are ours, not the authors': load_state_dict or timm's checkpoint_path= takes it as it is."
            )
        raise UserError("\n".join([f"{source}: the state dict does not fit.", *problems, advice]))
    dropped = [key for key in unused if key in official]
    if dropped:
        _logger.info("%s: dropped entries that the official code never uses: %s", source, ", ".join(dropped))
    network.load_state_dict({**own, **{key: official[name] for name, key in wanted.items() if name in official}})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a `.safetensors` file or a file of torch.save, unwrapped (see `unwrap`), on the CPU.

    Raises:
        UserError: There is no such file, it is damaged, or it holds Python objects, which could execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"{path}: no such weights file.\nGive the path of a .safetensors or .pth file, or true or false."
        )
    try:
        if path.suffix == ".safetensors":
            return unwrap(load_file(path))
        with warnings.catch_warnings():
            # A pickle protocol that torch does not write itself; what it cannot read, it refuses below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            check_saved(path, FOREIGN)
            with torch.serialization.safe_globals(_BESIDE):
                return unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except pickle.UnpicklingError as error:
        # torch reports a file that is no pickle at all the same way; the list of globals tells the two apart.
        if "GLOBAL" in str(error).upper():
            raise UserError(
                f"{path}: holds Python objects, which could execute code when loaded: refused.\n"
                "visattn reads tensors and plain values only; ask for the weights as .safetensors, or, of a file\n"
                'that you trust, save the tensors alone: torch.save(torch.load(FILE, weights_only=False)["model"], NEW)'
            ) from error
        raise UserError(f"{path}: no weights file: neither safetensors nor torch.save can read it.") from error
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        OSError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{path}: truncated or damaged weights file ({type(error).__name__}).\nCopy it again."
        ) from error


def unwrap(state: Any) -> dict[str, Tensor]:
    """The state dict inside what people save: without outer `state_dict` or `model`, and without `module.` prefixes.

    Raises:
        UserError: There is no state dict, or an entry of it is no tensor.
    """
    for _ in range(3):  # {"model": {"state_dict": ...}} occurs; deeper nesting does not
        if not isinstance(state, Mapping) or any(isinstance(value, Tensor | np.ndarray) for value in state.values()):
            break
        inner = [state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, Mapping) or not state:
        if isinstance(state, Mapping):
            raise UserError("the state dict is empty: it has to map names to tensors")
        raise UserError(f"holds no state dict (a mapping of names to tensors), but {type(state).__name__}")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | np.ndarray):
            raise UserError(f"the entry {key!r:.80} of the state dict is no tensor, but {type(value).__name__}")
        tensors[key] = torch.as_tensor(value)
    stripping = True
    while stripping:
        stripping = False
        for prefix in _PREFIXES:
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
                stripping = True
    return tensors
