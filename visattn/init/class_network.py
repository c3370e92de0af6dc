"""The classifier that a user asks for by name: what it costs, computed, and which size it takes.

As in `visattn.init.composed`, torch is needed only where a network is asked for.
"""

from functools import lru_cache
from typing import Any

from visattn.class_labels import ClassLabels
from visattn.errors import UserError
from visattn.init.budget import Network, choose_network
from visattn.init.composed import Wanted, mixer_of, network_costs, pyramid_for
from visattn.init.machine import Machine

_AUGMENT = {2: 0.0, 3: 0.5}  # seconds of one core that a million pixels or voxels take to augment
_SIDES = {2: 224, 3: 32}  # of the image that costs are computed for, where a network does not say what it was made for


def class_network(
    labels: ClassLabels, machine: Machine, channels: int, rank: int, wanted: Wanted | None = None
) -> Network:
    """The network that is wanted, or else the one that `choose_network` picks.

    Args:
        labels: The classes.
        machine: The machine.
        channels: Of the images.
        rank: 2 for images, 3 for volumes.
        wanted: What the user asks for.

    Raises:
        UserError: There is no such network or attention, they do not go together, or do not take such data.
    """
    if not wanted:
        return choose_network(labels, machine, rank=rank)
    from visattn.networks.classifier import classifier_side

    arguments = class_arguments(wanted, machine, rank)
    name = arguments["name"]
    network = _built(repr(arguments), channels, labels.channels)
    parameters, kept, own = network_costs(network, channels, rank, classifier_side(name) or _SIDES[rank])
    why = "as asked for; what it costs was computed"
    if not name.startswith("va_"):
        why += "; pretrained: true (a download) helps small sets"
    title = name + (f" with {wanted.attention} attention" if wanted.attention else "")
    return Network(title, arguments, why, parameters, kept, (0.02, own + _AUGMENT[rank]))


def class_arguments(wanted: Wanted, machine: Machine, rank: int) -> dict[str, Any]:
    """The recipe's `network` block for what is wanted.

    Raises:
        UserError: As for `class_network`.
    """
    from visattn.networks import NETWORKS
    from visattn.networks.classifier import check_classifier, classifier_rank

    if wanted.backbone:
        raise UserError(
            f"--backbone {wanted.backbone}: these data have classes, and a classifier is one network.\n"
            f"Name it with --network {wanted.backbone}."
        )
    name = wanted.network or pyramid_for(machine, rank)
    if name in NETWORKS:
        raise UserError(
            f"--network {name}: makes masks, and these data have classes.\n"
            "Networks that tell them: visattn models --task classification, and any of timm."
        )
    check_classifier({"name": name})
    arguments: dict[str, Any] = {"name": name, "pretrained": False}
    if wanted.attention:
        arguments["attention"] = mixer_of(wanted.attention, name, "--network", rank)
    given = classifier_rank(_built(repr(arguments), 1 if rank == 3 else 3, 2))
    if given != rank:
        kinds = {2: "images", 3: "volumes"}
        raise UserError(
            f"--network {name}: takes {kinds[given]}, and these are {kinds[rank]}.\n"
            "Which take what: visattn models --task classification."
        )
    return arguments


def only_side(network: Network) -> int | None:
    """Side of the square that a network for images was made for, where it says so."""
    from visattn.networks.classifier import classifier_side

    return classifier_side(network.arguments["name"])


def refusal(arguments: dict[str, Any], channels: int, classes: int, size: tuple[int, ...]) -> str:
    """Why a network does not take images or volumes of that size; empty where it does."""
    from visattn.summary import summarise

    try:
        summarise(_built(repr(arguments), channels, classes), (channels, *size))
    except UserError as error:
        return str(error)
    return ""


@lru_cache(maxsize=4)
def _built(arguments: str, channels: int, classes: int) -> Any:
    import ast

    from visattn.networks.classifier import create_classifier

    return create_classifier(**ast.literal_eval(arguments), in_channels=channels, classes=classes)
