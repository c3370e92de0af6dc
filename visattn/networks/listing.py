"""What there is to compose networks from, read off the registries; and one of them, built by its name alone."""

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, Literal

from torch import nn

from visattn.attention import ATTENTION, FUSION
from visattn.backbones import FAMILIES
from visattn.errors import UserError, did_you_mean, shown
from visattn.heads.unet import DECODERS, SKIPS, UPSAMPLING
from visattn.networks import NETWORKS, create_model, describe
from visattn.networks.classifier import create_classifier

Rows = list[dict[str, Any]]
Task = Literal["segmentation", "classification"]


def compositions(task: Task, pattern: str = "*") -> dict[str, Rows]:
    """What a recipe of the task may name, a list of rows with a `name` for each kind.

    Args:
        task: Segmentation: networks, backbones, skips, decoders, upsampling and blocks; classification: backbones and
            blocks.
        pattern: Of names of networks and backbones, as a shell's; anything but `*` leaves the other kinds out.
    """
    found = {"networks": [row for row in describe() if row["task"] == task], "backbones": backbones()}
    found = {kind: [row for row in rows if fnmatch(row["name"], pattern)] for kind, rows in found.items()}
    if pattern == "*":
        if task == "segmentation":
            found["skips"] = [_row(name, FUSION) for name in SKIPS]
            found["decoders"] = [{"name": name} for name in DECODERS]
            found["upsampling"] = [{"name": name} for name in UPSAMPLING]
        found["attention"] = [_row(name, ATTENTION) for name in ATTENTION]
    return {kind: rows for kind, rows in found.items() if rows}


def backbones() -> Rows:
    """A row for each of our backbones: name, family, spatial axes that it takes, and what its file says it is."""
    rows = []
    for name, module in FAMILIES.items():
        axes = "2-D or 3-D" if name == "va_pyramid" else "3-D" if "3d" in name else "2-D"
        about = (module.__doc__ or "").partition("\n")[0].rstrip(".")
        rows.append({"name": name, "family": module.__name__.rpartition(".")[2], "input": axes, "about": about})
    return rows


def build_model(
    name: str, rank: int, in_channels: int | None, classes: int | None, arguments: Mapping[str, Any]
) -> tuple[nn.Module, int]:
    """The network or backbone called `name`, and the channels of its images.

    Args:
        name: A key of `NETWORKS`, or a model of timm, ours among them, which is built as a classifier.
        rank: Spatial axes of the images.
        in_channels: Channels of the images; None: as the network has them by default.
        classes: Outputs; None: likewise.
        arguments: Further arguments.

    Raises:
        UserError: There is no such model or argument, or it does not take images of so many axes.
    """
    import timm

    arguments = dict(arguments)
    if arguments.pop("dims", rank) != rank:
        raise UserError(f"--size has {rank} numbers, so dims is {rank}; leave --dims out")
    in_channels, classes = arguments.pop("in_channels", in_channels), arguments.pop("classes", classes)
    ends = (("in_channels", in_channels), ("classes", classes))
    given: dict[str, Any] = {key: value for key, value in ends if value is not None}
    usual = 3 if rank == 2 else 1
    if name in NETWORKS:
        parameters = inspect.signature(NETWORKS[name]).parameters
        if "dims" in parameters:
            given["dims"] = rank
        elif rank == 3:
            raise UserError(f"network '{name}' takes images, not volumes; --size needs two numbers, as 352x352")
        network = create_model(name, **given, **arguments)
        default = parameters["in_channels"].default
        return network, in_channels or default or usual
    plain = name.partition(".")[0]
    if plain not in timm.list_models():
        hint = did_you_mean(plain, [*NETWORKS, *timm.list_models()])
        raise UserError(f"unknown model '{shown(plain[:80])}'.{hint}\nSee: visattn models --task segmentation")
    volumes = next((row["input"] for row in backbones() if row["name"] == plain), "2-D")
    if f"{rank}-D" not in volumes:
        raise UserError(f"backbone '{name}' takes {volumes} images; --size needs {volumes[0]} numbers")
    dims = {"dims": rank} if plain == "va_pyramid" else {}
    return create_classifier(name, in_channels or usual, classes or 1000, **{**dims, **arguments}), in_channels or usual


def _row(name: str, table: Mapping[str, type[nn.Module]]) -> dict[str, Any]:
    """Name, spatial axes and first line of a block; the two skips that are no block are plain."""
    if name not in table:
        return {"name": name, "input": "2-D, 3-D", "about": "Side by side" if name == "concat" else "Summed"}
    block = table[name]
    ranks: Sequence[int] = vars(block)["supported_ranks"]
    about = (inspect.getdoc(block) or "").partition("\n")[0].rstrip(".")
    return {"name": name, "input": ", ".join(f"{rank}-D" for rank in ranks), "about": about}
