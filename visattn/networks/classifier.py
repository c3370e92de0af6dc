"""Classifiers: any model that timm knows, ours among them, and what a recipe's `network` says of it."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import visattn.backbones  # noqa: F401 (registers our models with timm)
from visattn.errors import UserError, chosen, did_you_mean
from visattn.networks.features import RESERVED, check_available
from visattn.weights import read_weights

_OURS = {"name", "pretrained", "in_channels", "classes"}


def create_classifier(
    name: str, in_channels: int, classes: int, pretrained: bool | str | Path = False, **options: Any
) -> nn.Module:
    """Build a model that turns images (B, in_channels, *S) into logits (B, classes).

    Args:
        name: A model of timm, ours (`va_...`) among them, also with a weights tag: `convnext_tiny.fb_in22k`.
        in_channels: Channels of the images.
        classes: Outputs.
        pretrained: True downloads timm's weights; a path reads them from a file; the head of another number of classes
            is left as initialised. False: timm's initialisation.
        options: Further arguments of the model, as `{drop_path_rate: 0.1}`.

    Raises:
        UserError: There is no such model or argument (the nearest valid one is named), or its weights cannot be had.
    """
    import timm

    check_classifier({"name": name, "pretrained": pretrained, **options})
    if pretrained is True:
        check_available(name)
    try:
        network: nn.Module = timm.create_model(
            name, pretrained=pretrained is True, in_chans=in_channels, num_classes=classes, **options
        )
    except UserError:
        raise
    except Exception as error:  # models refuse arguments in any way they like
        raise _explained(name, options, error) from error
    if isinstance(pretrained, str | Path):
        _load(network, read_weights(pretrained), f"pretrained: {pretrained}")
    return network


def check_classifier(config: Mapping[str, Any]) -> None:
    """Check the `network` block of a recipe without building the model.

    Raises:
        UserError: An unknown name, or an argument that visattn sets itself.
    """
    import timm

    plain = {**config, "name": str(config["name"]).partition(".")[0]} if "name" in config else config
    chosen("network", plain, timm.list_models())
    base, dot, _ = config["name"].partition(".")
    tags = timm.list_pretrained(f"{base}.*") if dot else []
    if ":" in config["name"] or (dot and config["name"] not in tags):
        raise UserError(
            f"network '{config['name'][:200]}': no such weights.{did_you_mean(config['name'], tags)}\n"
            f"Known: {', '.join(tags[:8]) or 'none'}"
        )
    for key in config:
        if key in RESERVED and key not in _OURS:
            raise UserError(f"model.network: '{key}' is set by visattn; remove it")
    if not isinstance(config.get("pretrained", False), bool | str | Path):
        raise UserError(
            f"model.network: pretrained must be true, false or the path of a file, got {config['pretrained']!r:.80}"
        )
    options = {key: value for key, value in config.items() if key not in _OURS}
    if options:  # a model takes any keyword and refuses it when it is built, which costs nothing without storage
        try:
            with torch.device("meta"):
                timm.create_model(config["name"], **options)
        except TypeError as error:
            if "unexpected keyword" in str(error):
                raise _explained(config["name"], options, error) from error
        except Exception:
            return  # not every model can be built without storage; the real one speaks for itself


def classifier_rank(network: nn.Module) -> int:
    """Spatial axes of the data that a classifier takes: 3 for volumes, told by its convolutions, else 2."""
    return 3 if any(isinstance(module, nn.Conv3d) for module in network.modules()) else 2


def classifier_side(name: str) -> int | None:
    """Side of the square image that a model was made for; None where it does not say so, as those for volumes."""
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    size = getattr(config, "input_size", None)
    return int(size[-1]) if size else None


def _explained(name: str, options: Mapping[str, Any], error: Exception) -> UserError:
    """What a model says of its arguments, with the nearest valid one where it does not know one."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    wrong = next((key for key in options if f"keyword argument '{key}'" in first), None)
    if wrong is None:
        return UserError(f"network '{name}' cannot be built with these arguments ({type(error).__name__}: {first})")
    valid: list[str] = []
    trace = error.__traceback__
    while trace is not None:  # the builders of timm and ours hold what refused
        local = trace.tb_frame.f_locals
        for model in (local.get("builder"), local.get("model_cls")):
            if inspect.isclass(model) or inspect.isfunction(model):
                valid = [key for key in inspect.signature(model).parameters if key not in RESERVED] or valid
        trace = trace.tb_next
    listed = f"\nIt takes: {', '.join(valid)[:300]}" if valid else ""
    return UserError(f"network '{name}' has no argument '{wrong}'.{did_you_mean(wrong, valid)}{listed}")


def _load(network: nn.Module, given: Mapping[str, Tensor], source: str) -> None:
    """Take over weights; the classifier's own are left as they are where they are of another number of classes."""
    own = network.state_dict()
    config = getattr(network, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    head = {key for key in own if key.rpartition(".")[0] in heads}
    left = {key for key in head if key not in given or given[key].shape != own[key].shape}
    missing = [key for key in own if key not in given and key not in left]
    odd = [key for key in own if key in given and key not in left and given[key].shape != own[key].shape]
    strange = [key for key in given if key not in own]
    if missing or odd or strange:
        first = (missing or odd or strange)[0]
        raise UserError(
            f"{source}: these are not the weights of this network: {len(missing)} missing, {len(strange)} unknown, "
            f"{len(odd)} of another shape (first: {first}).\nA checkpoint of visattn goes into init_from instead."
        )
    network.load_state_dict({key: own[key] if key in left else given[key] for key in own})
