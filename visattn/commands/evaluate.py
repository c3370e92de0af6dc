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
    parser.add_argument(
        "--cases", type=Path, metavar="FILE", help="score these cases alone: a run's cases.csv, or a name on each line"
    )
    volumes = parser.add_argument_group("volumes")
    volumes.add_argument("--tolerance", type=float, metavar="MM", help="of NSD (default: 2)")
    volumes.add_argument("--lesion_iou", type=float, metavar="X", help="IoU that finds a lesion (default: 0.1)")
    volumes.add_argument("--minimum_ml", type=float, metavar="ML", help="smaller lesions do not count (default: 0)")
    volumes.add_argument("--patient_dice", type=float, metavar="X", help="Dice that finds a patient (default: 0.25)")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.evaluate import evaluate_folder, make_rules

    return evaluate_folder(
        options.prediction,
        options.truth,
        options.labels,
        output=options.output,
        images=options.images,
        group_by=options.group_by,
        missing=options.missing,
        cases=options.cases,
        rules=make_rules(
            tolerance=options.tolerance,
            lesion_iou=options.lesion_iou,
            minimum_ml=options.minimum_ml,
            patient_dice=options.patient_dice,
        ),
    )
