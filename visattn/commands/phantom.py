"""`visattn phantom`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "write the embedded synthetic images and masks to a folder"
    phantom = commands.add_parser("phantom", help=text, description=text)
    phantom.add_argument("folder", type=Path, metavar="DIR", help="gets images/ and masks/")
    phantom.add_argument("--count", type=int, default=24, help="number of images (default: 24)")
    phantom.add_argument("--seed", type=int, default=1, help="another seed, other images (default: 1)")
    phantom.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.data.phantom import write_phantom

    write_phantom(options.folder, options.count, options.seed)
    print(f"{options.count} synthetic images: {options.folder}")
    return 0
