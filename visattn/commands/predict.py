"""`visattn predict`."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visattn.errors import UserError

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_IMAGES = ("threshold",)  # options that mean something for images alone, and for volumes alone
_CLASSES = ("split",)
_VOLUMES = ("cases", "uncertainty", "bids", "overlap", "precision", "memory")


def add(commands: Any) -> None:
    """Register the command."""
    text = "write masks or classes of images or volumes, or folders of them"
    parser = commands.add_parser("predict", help=text, description=text)
    parser.add_argument(
        "inputs",
        nargs="*",
        type=Path,
        metavar="INPUT",
        help="image, NIfTI file, DICOM folder, MedMNIST's .npz, or folder searched with its subfolders",
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="C",
        help=".ckpt, run folder, run with folds, or exported .safetensors; it tells images from volumes",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for masks, mirroring the input folders, or for a table of classes",
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write probabilities: 16-bit PNG, or float32 NIfTI"
    )
    parser.add_argument("--overlays", action="store_true", help="also draw the prediction's outline on the image")
    parser.add_argument(
        "--tta", choices=("none", "flips"), default="none", help="average over flipped images (default: none)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is already there")
    images = parser.add_argument_group("images")
    images.add_argument("--threshold", type=float, help="foreground from this probability on (default: 0.5)")
    volumes = parser.add_argument_group("volumes")
    volumes.add_argument(
        "--cases", type=Path, metavar="CSV", help="table of cases: the column case, and one for each channel"
    )
    volumes.add_argument(
        "--uncertainty", action="store_true", default=None, help="also write entropy, and variance over views or folds"
    )
    volumes.add_argument("--bids", action="store_true", default=None, help="name the files as BIDS derivatives")
    volumes.add_argument("--overlap", type=float, help="share by which windows overlap (default: 0.5)")
    volumes.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="what convolutions compute in; auto is bfloat16 on a GPU (default: auto)",
    )
    volumes.add_argument(
        "--memory", type=_bytes, metavar="4G", help="most memory to take; large volumes then use the disk of --output"
    )
    classes = parser.add_argument_group("classes")
    classes.add_argument("--split", choices=("train", "val", "test"), help="of .npz files, this part alone")
    parser.set_defaults(call=_call)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; write it as 4G or 800M")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.members import rank_of, read_members

    if not options.inputs and options.cases is None:
        raise UserError("predict: name images, volumes or folders of them, or a table with --cases.")
    members = read_members(options.checkpoint)
    if members[0].task == "classification":
        return _classify(options, members)
    for name in _CLASSES:
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: is for classifiers, but {options.checkpoint} makes masks.")
    common = {
        "probabilities": options.probabilities,
        "overlays": options.overlays,
        "tta": options.tta,
        "device": options.device,
        "overwrite": options.overwrite,
        "members": members,
    }
    # A network for images may take volumes slice by slice; whether this one does is told where it is loaded.
    volumes = rank_of(members[0]) == 3 or _are_volumes(options.inputs, options.cases)
    kind, other = ("volumes", "images") if volumes else ("images", "volumes")
    for name in _IMAGES if volumes else _VOLUMES:
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: is for networks of {other}, but that of {options.checkpoint} takes {kind}.")
    if volumes:
        from visattn.predict_volumes import predict_volumes

        given = {key: getattr(options, key) for key in _VOLUMES if key != "cases" and getattr(options, key) is not None}
        return predict_volumes(
            options.inputs, options.checkpoint, options.output, cases_csv=options.cases, **common, **given
        )
    from visattn.predict import predict_folder

    threshold = 0.5 if options.threshold is None else options.threshold
    return predict_folder(options.inputs, options.checkpoint, options.output, threshold=threshold, **common)


def _classify(options: argparse.Namespace, members: Any) -> int:
    for name in ("probabilities", "overlays", *_IMAGES, *_VOLUMES):
        if getattr(options, name) not in (None, False):
            raise UserError(f"--{name}: is for masks, but {options.checkpoint} tells classes.")
    from visattn.predict_classes import predict_classes

    return predict_classes(
        options.inputs,
        options.checkpoint,
        options.output,
        split=options.split,
        tta=options.tta,
        device=options.device,
        overwrite=options.overwrite,
        members=members,
    )


def _are_volumes(inputs: Sequence[Path], cases: Path | None) -> bool:
    """Whether volumes are given, and no images."""
    from visattn.data.images import SUFFIXES
    from visattn.data.nifti import is_nifti
    from visattn.data.volume_names import is_dicom, is_volume_name
    from visattn.files import walk_files

    def kind(path: Path) -> str:
        if path.suffix.lower() in SUFFIXES:
            return "images"
        return "volumes" if is_volume_name(path) or is_nifti(path) or is_dicom(path) else ""

    kinds = {"volumes"} if cases is not None else set()
    for given in inputs:
        found: set[str] = set()
        if given.is_file():
            found = {kind(given)}
        elif given.is_dir():
            for _, files in walk_files(given):
                found |= {kind(path) for path in files if path.is_file()}
                if "images" in found:  # pictures of volumes beside them, or a few volumes among images
                    found = {"images"}
                    break
        kinds |= found
    if {"images", "volumes"} <= kinds:
        raise UserError("predict: some inputs are images, others volumes.\nPredict them one after the other.")
    return "volumes" in kinds
