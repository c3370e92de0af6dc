"""The network that a user asks for by name, with what it costs: computed, where the defaults of init were measured.

Only here does init need torch, and only where it is asked for a network.
"""

import inspect
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from visattn.errors import UserError, unknown
from visattn.init.budget import MULTIPLE, SMALLEST, Network, choose_network
from visattn.init.machine import Machine
from visattn.init.volume_grid import Levels
from visattn.labels import Labels

_SIDES = {2: 256, 3: 48}  # of the image that costs are computed for
_PYRAMID = "va_pyramid"
_BATCH = 2
_STAGES = 4  # of a pyramid
_LARGEST = 4096  # side of an image
# Seconds of one core for each million pixels, fitted to the networks that were measured: for an operation of a
# prediction and for a byte that a step keeps, a pixel; and what augmentation of volumes takes.
_PER_FLOP, _PER_BYTE, _AUGMENT3D = 2.5e-5, 1.25e-3, 1.2


@dataclass(frozen=True)
class Wanted:
    """What the user asks for; None: as init sees fit.

    Args:
        network: A key of `NETWORKS`; with only one of the others: unet.
        attention: A key of `ATTENTION`, for the pyramid that encodes.
        backbone: A timm model, ours among them.
    """

    network: str | None = None
    attention: str | None = None
    backbone: str | None = None

    def __bool__(self) -> bool:
        return any((self.network, self.attention, self.backbone))


def network_for(
    labels: Labels, machine: Machine, channels: int, levels: Levels | None = None, wanted: Wanted | None = None
) -> Network:
    """The network that is wanted, or else the one that `choose_network` picks.

    Args:
        labels: The labels.
        machine: The machine.
        channels: Of the images.
        levels: How a network for volumes goes down; None: for images.
        wanted: What the user asks for.

    Raises:
        UserError: There is no such network, backbone or attention, or they do not go together.
    """
    default = "pranet" if levels is None else "unet3d"
    if not wanted or wanted == Wanted(network=default):
        return choose_network(labels, machine, levels)
    arguments = wanted_arguments(wanted, 2 if levels is None else 3, machine)
    # The pyramid halves four times unless it is told otherwise, and pads what it cannot.
    usual = levels is None or (levels.plain and len(levels.strides) >= _STAGES)
    if levels is not None and str(arguments.get("backbone", "")).startswith(_PYRAMID) and not usual:
        steps = [list(step) for step in levels.strides[:_STAGES]]
        steps += [[1, 1, 1]] * (_STAGES - len(steps))
        arguments["backbone_args"] = {**arguments.get("backbone_args", {}), "strides": steps}
    why = "as asked for; what it costs was computed"
    if "strides" in arguments.get("backbone_args", {}):
        why += "; strides follow the patch and the voxels' shape"
    title = arguments["name"] + (f" with {wanted.attention} attention" if wanted.attention else "")
    rank = 2 if levels is None else 3
    parameters, kept, seconds = _cost(repr(arguments), channels, labels.channels, rank)
    sides = _sides(_built(repr(arguments), channels, labels.channels)) if rank == 2 else {}
    return Network(title, arguments, why, parameters, kept, seconds, **sides)


def wanted_arguments(wanted: Wanted, rank: int, machine: Machine) -> dict[str, Any]:
    """The recipe's `network` block for what is wanted.

    Args:
        wanted: What the user asks for.
        rank: Spatial axes of the data.
        machine: Where it is trained: a smaller pyramid without a GPU.

    Raises:
        UserError: As for `network_for`.
    """
    from visattn.networks import NETWORKS

    name = wanted.network or "unet"
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    parameters = inspect.signature(NETWORKS[name]).parameters
    arguments: dict[str, Any] = {"name": name}
    if "dims" in parameters:
        if parameters["dims"].default != rank:
            arguments["dims"] = rank
    elif rank == 3:
        able = [each for each, build in NETWORKS.items() if "dims" in inspect.signature(build).parameters]
        raise UserError(
            f"--network {name}: takes images, and these are volumes.\nThose that take them: {', '.join(able)}"
        )
    if "deep_supervision" in parameters and parameters["deep_supervision"].default:
        arguments["deep_supervision"] = False  # one output, one loss: more is for those who know why
    if "backbone" not in parameters:
        for option, value in (("--attention", wanted.attention), ("--backbone", wanted.backbone)):
            if value:
                able = [each for each, build in NETWORKS.items() if "backbone" in inspect.signature(build).parameters]
                raise UserError(
                    f"{option} {value}: network '{name}' is built of its own blocks.\n"
                    f"Networks over a backbone: {', '.join(able)}"
                )
        return arguments
    backbone = wanted.backbone or pyramid_for(machine, rank)
    arguments |= {"backbone": backbone, "pretrained": False}
    if wanted.attention:
        hint = "\nIn the decoder of unet it is set by network.decoder in the recipe."
        arguments["backbone_args"] = {"attention": mixer_of(wanted.attention, backbone, "--backbone", rank, hint)}
    return arguments


def pyramid_for(machine: Machine, rank: int) -> str:
    """The preset of the pyramid that the machine can train."""
    return f"{_PYRAMID}{'3d' if rank == 3 else ''}_{'tiny' if machine.device == 'cpu' else 'small'}"


def mixer_of(attention: str, network: str, option: str, rank: int, hint: str = "") -> str | dict[str, Any]:
    """The `attention` argument of a pyramid.

    Args:
        attention: What the user asks for.
        network: The network that is to have it.
        option: The option that named the network.
        rank: 2 or 3.
        hint: What a refusal says besides.

    Raises:
        UserError: There is no such attention, or the network is no pyramid.
    """
    from visattn.attention import ATTENTION

    if attention not in ATTENTION:
        raise unknown("attention", attention, ATTENTION)
    if not network.startswith(_PYRAMID):
        raise UserError(
            f"--attention {attention}: the blocks of '{network}' are its own; leave {option} out for a pyramid of "
            f"{attention}.{hint}"
        )
    if rank == 3 and attention == "neighborhood":
        return {"name": attention, "kernel_size": 5}  # as the pyramids of volumes have it: 7 would be 343 neighbours
    return attention


@lru_cache(maxsize=2)
def _built(arguments: str, channels: int, classes: int) -> Any:
    """The network itself; building one takes longer than all that is asked of it."""
    import ast

    from visattn.networks import create_model

    return create_model(**ast.literal_eval(arguments), in_channels=channels, classes=classes)


def _sides(network: Any) -> dict[str, int]:
    """Which squares a network for images does not pad: `multiple` and `smallest` of their sides, or the `only` one.

    What has windows of eight pixels in maps a 32nd as large, for one, wants multiples of 256.
    """
    if not hasattr(network, "padded_size"):  # networks of convolutions, which multiples of 32 suit
        return {}
    try:
        network.padded_size((_LARGEST,) * 2)
    except UserError:
        return {"only": int(network.padded_size((1, 1))[0])}
    sides = (side for side in range(MULTIPLE, _LARGEST, MULTIPLE) if network.padded_size((side, side)) == (side, side))
    first, second = next(sides), next(sides)
    return {"multiple": second - first, "smallest": math.ceil(SMALLEST / first) * first}


@lru_cache(maxsize=16)
def _cost(arguments: str, channels: int, classes: int, rank: int) -> tuple[float, float, tuple[float, float]]:
    network = _built(arguments, channels, classes)
    only = _sides(network).get("only") if rank == 2 else None
    parameters, kept, seconds = network_costs(network, channels, rank, only or _SIDES[rank])
    return parameters, kept, (0.05, seconds + (_AUGMENT3D if rank == 3 else 0))


def network_costs(network: Any, channels: int, rank: int, side: int) -> tuple[float, float, float]:
    """Parameters, bytes that a step keeps for each pixel, and seconds of one core for a million pixels.

    Args:
        network: The module.
        channels: Of the image.
        rank: Spatial axes.
        side: Of the image that is computed for.

    Raises:
        UserError: The network does not take such an image.
    """
    from visattn.summary import summarise

    shape = (channels, *(side,) * rank)
    found = summarise(network, shape, _BATCH)
    pixels = math.prod(shape[1:])
    kept = max(found.step_bytes - 4 * found.trainable, 0) / (_BATCH * pixels)
    return float(found.parameters), kept, _PER_FLOP * found.flops / pixels + _PER_BYTE * kept
