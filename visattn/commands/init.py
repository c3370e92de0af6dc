"""`visattn init`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "look at a data set and this machine, and write a recipe that trains on it"
    parser = commands.add_parser("init", help=text, description=text)
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="data set: images and masks, volumes with labels, class folders, a table (.csv), MedMNIST's .npz",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="RECIPE.yaml", help="file to write")
    parser.add_argument("--network", metavar="NAME", help="the network, as visattn models lists them")
    parser.add_argument("--attention", metavar="NAME", help="the mechanism of the pyramid that encodes, as halo")
    parser.add_argument("--backbone", metavar="NAME", help="the encoder: any va_... or timm model")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.init import write_recipe
    from visattn.init.composed import Wanted

    wanted = Wanted(options.network, options.attention, options.backbone)
    return write_recipe(options.folder, options.output, overwrite=options.overwrite, wanted=wanted)
