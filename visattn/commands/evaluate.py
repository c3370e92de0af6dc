"""`visattn evaluate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visattn.errors import UserError, shown

_TABLE = "predictions.csv"
_VOLUMES = ("tolerance", "lesion_iou", "minimum_ml", "patient_dice")


def add(commands: Any) -> None:
    """Register the command."""
    text = "score masks or a table of classes, made by any tool, against the true ones"
    parser = commands.add_parser("evaluate", help=text, description=text)
    parser.add_argument("prediction", type=Path, metavar="PRED", help="folder of predicted masks, or predictions.csv")
    parser.add_argument(
        "truth",
        type=Path,
        metavar="GT",
        help="folder of true masks, or with images/ and masks/, paired by file stem; class folders, table or .npz",
    )
    parser.add_argument(
        "--labels", type=Path, metavar="FILE", help="YAML with the labels block of a recipe alone; masks need it"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the results (default: PRED/evaluation)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="the images, to draw overlays on")
    parser.add_argument("--group_by", metavar="EXPR", help="patient or video of a case: as data.split.group_by")
    parser.add_argument(
        "--missing",
        choices=("error", "miss"),
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
    classes = parser.add_argument_group("classes")
    classes.add_argument("--multi_label", action="store_true", help="a case may have several classes")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.prediction.suffix.lower() == ".csv" and not options.prediction.is_dir():
        return _classes(options)
    if options.labels is None:
        raise UserError(_without_labels(options.prediction))
    if options.multi_label:
        raise UserError("--multi_label: is for a table of classes; masks say so in their labels")
    from visattn.evaluate import evaluate_folder, make_rules

    return evaluate_folder(
        options.prediction,
        options.truth,
        options.labels,
        output=options.output,
        images=options.images,
        group_by=options.group_by,
        missing=options.missing or "error",
        cases=options.cases,
        rules=make_rules(
            tolerance=options.tolerance,
            lesion_iou=options.lesion_iou,
            minimum_ml=options.minimum_ml,
            patient_dice=options.patient_dice,
        ),
    )


def _without_labels(prediction: Path) -> str:
    lines = [
        "evaluate: masks need --labels FILE, a YAML with the labels block of a recipe alone, as",
        "  background: 0",
        "  lesion: 255",
    ]
    if (prediction / _TABLE).is_file():
        lines.append(f"If these are classes, no masks, give {shown(prediction / _TABLE)}.")
    return "\n".join(lines)


def _classes(options: argparse.Namespace) -> int:
    masks = ("labels", "images", "group_by", "missing", "cases", *_VOLUMES)
    for name in masks:
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: is for masks, but {options.prediction} is a table of classes.")
    from visattn.evaluate_classes import evaluate_classes

    return evaluate_classes(options.prediction, options.truth, options.output, options.multi_label)
