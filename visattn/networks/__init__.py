"""Whole networks.

A builder takes `in_channels` and `classes` beside its own arguments. The network it returns is called with images
(B, in_channels, *S) and gives logits (B, classes, *S), in training and evaluation alike; with side outputs it gives a
tuple of maps, the prediction first, the others of the same or of lower resolutions. `output_names` names the maps.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visattn.errors import UserError, chosen, did_you_mean
from visattn.networks import agunet as _agunet
from visattn.networks import att_swin_unet as _att_swin_unet
from visattn.networks import pranet as _pranet
from visattn.networks import unet as _unet
from visattn.networks import unet3d as _unet3d

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "agunet": _agunet.agunet,
    "att_swin_unet": _att_swin_unet.att_swin_unet,
    "daunet": _agunet.daunet,
    "fpn": _unet.fpn,
    "linear": _unet.linear,
    "pranet": _pranet.pranet,
    "unet": _unet.unet,
    "unet3d": _unet3d.unet3d,
    "upernet": _unet.upernet,
}
"""Builders by the name that recipes use."""

_INFO: dict[str, dict[str, Any]] = {
    **_agunet.INFO,
    "att_swin_unet": _att_swin_unet.INFO,
    "pranet": _pranet.INFO,
    **_unet.INFO,
    "unet3d": _unet3d.INFO,
}

__all__ = ["NETWORKS", "check_network", "create_model", "describe", "network_rank", "prediction"]


def create_model(name: str, *, activation: str | None = None, **kwargs: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: A key of `NETWORKS`.
        activation: How the logits will be read, `sigmoid` or `softmax`. Handed to the networks whose arithmetic depends
            on it, as PraNet's does; the others give logits without asking.
        kwargs: Arguments of the builder.

    Raises:
        UserError: An unknown network or argument (the nearest valid one is named), or a value that cannot be.
    """
    check_network({"name": name, "activation": activation, **kwargs})
    parameters = inspect.signature(NETWORKS[name]).parameters
    if "activation" in parameters:
        kwargs["activation"] = activation
    if "pretrained" not in parameters:
        kwargs.pop("pretrained", None)  # false, which says nothing to a network that has no weights to fetch
    try:
        return NETWORKS[name](**kwargs)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"network '{name}' cannot be built with these arguments ({type(error).__name__}: {first[:300]}).\n"
            f"Given: {', '.join(f'{key} {value!r:.60}' for key, value in kwargs.items())}"
        ) from error


def _is_backbone(name: str) -> bool:
    import timm  # a second, which only a wrong name costs

    return timm.is_model(name)


def check_network(config: Mapping[str, Any]) -> None:
    """Check the `network` block of a recipe without building anything.

    Args:
        config: `name` and arguments of `create_model`.

    Raises:
        UserError: As for `create_model`.
    """
    given = config.get("name")
    if isinstance(given, str) and given not in NETWORKS and _is_backbone(given):
        raise UserError(
            f"network '{given}' is a backbone, which makes no masks by itself.\n"
            f"For masks: unet (or another network) with backbone: {given}; for classes: timm.create_model('{given}')."
        )
    name = chosen("network", config, NETWORKS)
    parameters = inspect.signature(NETWORKS[name]).parameters
    valid = [*parameters, "activation"]
    for key, value in config.items():
        if key == "name" or (key == "pretrained" and value is False):
            continue
        if key not in valid:
            raise UserError(
                f"network '{name}' has no argument '{key}'.{did_you_mean(key, valid)}\n"
                f"It takes: {', '.join(dict.fromkeys(valid))}"
            )
        counts = key in ("in_channels", "classes") or (key == "channels" and type(parameters[key].default) is int)
        if counts and (type(value) is not int or value < 1) and not (value is None is parameters[key].default):
            raise UserError(f"network '{name}': {key} must be a whole number above 0, got {value!r}")
        if key == "pretrained" and not isinstance(value, bool | str | Path):
            raise UserError(
                f"network '{name}': pretrained must be true, false or the path of a file, got {value!r:.80}"
            )
        if key == "activation" and value not in (None, "sigmoid", "softmax"):
            raise UserError(f"network '{name}': activation must be sigmoid or softmax, got {value!r}")


def network_rank(config: Mapping[str, Any]) -> int:
    """Spatial axes of the data that the `network` block of a recipe takes: 2 for images, 3 for volumes."""
    dims = inspect.signature(NETWORKS[config["name"]]).parameters.get("dims")
    return 2 if dims is None else int(config.get("dims", dims.default))


def describe() -> list[dict[str, Any]]:
    """A row per network for `visattn models`: name, task, input, parameters, paper, licence of the weights."""
    return [dict(_INFO[name]) for name in NETWORKS]


def prediction(output: Tensor | tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """The map (B, classes, *S) that is the prediction, whether a network has side outputs or not."""
    return output if isinstance(output, Tensor) else output[0]
