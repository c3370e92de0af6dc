"""`visattn evaluate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "score a folder of masks, made by any tool, against the true ones"
    parser = commands.add_parser("evaluate", help=text, description=text)
    parser.add_argument("prediction", type=Path, metavar="PRED", help="folder of predicted masks, with subfolders")
    parser.add_argument(
        "truth", type=Path, metavar="GT", help="folder of true masks, or with images/ and masks/; paired by file stem"
    )
    parser.add_argument(
        "--labels", required=True, type=Path, metavar="FILE", help="YAML with the labels block of a recipe alone"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the results (default: PRED/evaluation)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images, to draw overlays on")
    parser.add_argument("--group_by", metavar="EXPR", help="patient or video of a case: as data.split.group_by")
    parser.add_argument(
        "--missing",
        choices=("error", "miss"),
        default="error",
        help="a case without prediction: refuse (default), or count it as a miss and leave surplus predictions out",
    )
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.evaluate import evaluate_folder

    return evaluate_folder(
        options.prediction,
        options.truth,
        options.labels,
        output=options.output,
        images=options.images,
        group_by=options.group_by,
        missing=options.missing,
    )
