"""The checkpoints that predict together, what they mean, and their networks on a device."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visattn.checkpoint import Checkpoint, build_network, read_checkpoint
from visattn.class_labels import ClassLabels
from visattn.data.class_preprocessing import ClassPreprocessing
from visattn.data.images import Preprocessing
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.errors import UserError, unknown
from visattn.folds_file import has_folds, read_folds
from visattn.labels import Labels
from visattn.postprocessing import PostProcessing

DEVICES = ("auto", "cpu", "cuda", "mps")


def read_members(checkpoint: Path | str) -> tuple[Checkpoint, ...]:
    """The checkpoints that predict together: the best of every fold of a run with folds, else the one there is.

    Raises:
        UserError: One is missing or damaged, or they do not belong together.
    """
    path = Path(checkpoint)
    if not has_folds(path):
        return (read_checkpoint(path),)
    members = tuple(read_checkpoint(file) for file in read_folds(path).checkpoints())
    check_members(members)
    return members


def place_networks(checkpoints: Sequence[Checkpoint], device: torch.device) -> tuple[nn.Module, ...]:
    """The networks of the checkpoints, in eval mode, on the device.

    Raises:
        UserError: A checkpoint does not fit this version, or the device's memory does not suffice.
    """
    networks = [build_network(checkpoint) for checkpoint in checkpoints]
    try:
        return tuple(network.to(device) for network in networks)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}\nTry --device cpu.") from error


def check_members(members: Sequence[Checkpoint]) -> None:
    """Refuse networks whose probabilities mean different things."""
    first = members[0]
    for other in members[1:]:
        for key in ("task", "labels", "preprocessing", "network", "postprocessing"):
            if getattr(other, key) != getattr(first, key):
                raise UserError(
                    f"{other.path}: its {key} differ{'s' if key in ('task', 'network') else ''} from those of "
                    f"{first.path}: {_difference(getattr(other, key), getattr(first, key))}.\n"
                    "Folds predict together only if they were trained with one recipe. Give one fold's run folder."
                )


def _difference(value: Any, other: Any) -> str:
    """Two values that differ, as short as they can be told."""
    if isinstance(value, dict) and isinstance(other, dict):
        key = next(key for key in sorted({*value, *other}) if value.get(key) != other.get(key))
        return f"{key}: {_difference(value.get(key), other.get(key))}"
    return f"{value!s:.60} and {other!s:.60}"


def parse_checkpoint(checkpoint: Checkpoint) -> tuple[Labels, Preprocessing | VolumePreprocessing, float]:
    """Labels, preprocessing and threshold of a checkpoint; the preprocessing tells images from volumes by its `rank`.

    Raises:
        UserError: One of them makes no sense.
    """
    if checkpoint.task != "segmentation":
        raise UserError(f"{checkpoint.path}: its task is '{checkpoint.task}'; masks need a segmentation network.")
    try:
        labels = Labels.from_config(**checkpoint.labels)
        preprocessing, channels = _parse_preprocessing(checkpoint.preprocessing)
        threshold = float(checkpoint.postprocessing["threshold"])
        if not math.isfinite(threshold):
            raise ValueError("postprocessing: the threshold is not finite")
        expectations = {"classes": labels.channels, "in_channels": channels, "activation": labels.activation}
        for key, expected in expectations.items():
            if checkpoint.network.get(key, expected) != expected:
                raise ValueError(f"network.{key} is {checkpoint.network[key]}, not {expected}")
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{checkpoint.path}: damaged checkpoint: its labels or preprocessing make no sense ({error}).\n"
            "Use another checkpoint of the same run."
        ) from error
    return labels, preprocessing, threshold


def parse_postprocessing(checkpoint: Checkpoint) -> PostProcessing:
    """What is done to the masks of a checkpoint's network.

    Raises:
        UserError: It makes no sense.
    """
    try:
        labels = Labels.from_config(**checkpoint.labels)
        return PostProcessing.from_config(checkpoint.postprocessing.get("steps"), labels, rank_of(checkpoint))
    except (TypeError, UserError) as error:
        raise UserError(
            f"{checkpoint.path}: damaged checkpoint: its post-processing makes no sense ({error}).\n"
            "Use another checkpoint of the same run."
        ) from error


def parse_classifier(checkpoint: Checkpoint) -> tuple[ClassLabels, ClassPreprocessing]:
    """Classes and preprocessing of a classifier's checkpoint.

    Raises:
        UserError: It is of another task, or one of them makes no sense.
    """
    if checkpoint.task != "classification":
        raise UserError(f"{checkpoint.path}: its task is '{checkpoint.task}'; classes need a classification network.")
    try:
        labels = ClassLabels.from_config(**checkpoint.labels)
        preprocessing = ClassPreprocessing.from_config(checkpoint.preprocessing)
        for key, expected in {"classes": labels.channels, "in_channels": preprocessing.in_channels}.items():
            if checkpoint.network.get(key) != expected:
                raise ValueError(f"network.{key} is {checkpoint.network.get(key)}, not {expected}")
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as error:
        raise UserError(
            f"{checkpoint.path}: damaged checkpoint: its labels or preprocessing make no sense ({error}).\n"
            "Use another checkpoint of the same run."
        ) from error
    return labels, preprocessing


def rank_of(checkpoint: Checkpoint) -> int:
    """3 if a checkpoint is for volumes, 2 if it is for images."""
    return VolumePreprocessing.rank if checkpoint.preprocessing.get("rank") == VolumePreprocessing.rank else 2


def _parse_preprocessing(config: Mapping[str, Any]) -> tuple[Preprocessing | VolumePreprocessing, int]:
    """The preprocessing and the channels that the network takes."""
    if config.get("rank") == VolumePreprocessing.rank:
        volumes = VolumePreprocessing.from_config(config)
        if not all(method.complete for method in volumes.normalise):
            raise ValueError("preprocessing: statistics of 'ct' are missing")
        for length in (*(volumes.size or ()), *(volumes.patch or ())):
            if length > 1 << 14:
                raise ValueError(f"preprocessing: a size of {length} voxels")
        return volumes, volumes.in_channels
    images = Preprocessing.from_config(dict(config))
    height, width = images.size
    widths = {len(images.mean), len(images.std), images.channels}
    if min(height, width) < 1 or max(height, width) > 1 << 14 or widths not in ({1}, {3}):
        raise ValueError(f"preprocessing: size {images.size} for {images.channels} channels")
    if not all(math.isfinite(x) for x in (*images.mean, *images.std)):
        raise ValueError("preprocessing: a number is not finite")
    if min(images.std) <= 0:
        raise ValueError("preprocessing: std must be above 0")
    return images, images.channels


def find_device(name: str) -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.

    Raises:
        UserError: It is unknown, or not on this machine.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    kind, _, index = name.partition(":")
    if kind not in there:
        raise unknown("device", name, DEVICES)
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there[kind] or (index and not (index.isdecimal() and int(index) < count)):
        raise UserError(f"--device {name}: not on this machine.\nUse --device auto, or cpu.")
    return torch.device(name)
