"""`visattn predict`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "write masks for images or folders of images"
    parser = commands.add_parser("predict", help=text, description=text)
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="image file, or folder searched with its subfolders"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="C",
        help=".ckpt, run folder, run with folds, or exported .safetensors",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder for masks; mirrors the input folders"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write 16-bit PNG probabilities, one for each class"
    )
    parser.add_argument("--overlays", action="store_true", help="also write images with the prediction's outline")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="foreground from this probability on (default: 0.5)"
    )
    parser.add_argument(
        "--tta", choices=("none", "flips"), default="none", help="average over flipped images (default: none)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is already there")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.predict import predict_folder

    return predict_folder(
        options.inputs,
        options.checkpoint,
        options.output,
        probabilities=options.probabilities,
        overlays=options.overlays,
        threshold=options.threshold,
        tta=options.tta,
        device=options.device,
        overwrite=options.overwrite,
    )
