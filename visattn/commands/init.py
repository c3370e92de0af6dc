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
    parser.add_argument("--network", metavar="NAME", help="as visattn models lists them; for classes also any of timm")
    parser.add_argument("--attention", metavar="NAME", help="mechanism of a pyramid as encoder or classifier, as halo")
    parser.add_argument("--backbone", metavar="NAME", help="encoder of a network for masks: any va_... or of timm")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.init import write_recipe
    from visattn.init.composed import Wanted

    wanted = Wanted(options.network, options.attention, options.backbone)
    return write_recipe(options.folder, options.output, overwrite=options.overwrite, wanted=wanted)
