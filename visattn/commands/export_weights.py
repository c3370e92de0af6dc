"""`visattn export-weights`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "write a checkpoint's weights as safetensors with a JSON description"
    export = commands.add_parser("export-weights", help=text, description=text)
    export.add_argument("checkpoint", type=Path, metavar="CKPT")
    export.add_argument("--output", required=True, type=Path, metavar="W.safetensors")
    export.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.checkpoint import export_weights

    for path in export_weights(options.checkpoint, options.output):
        print(path)
    return 0
