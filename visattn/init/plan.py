"""From what a data set holds and a machine can do to every value of a recipe, each with its reason."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visattn.errors import UserError
from visattn.init.budget import BATCH, Budget, Network, plan_budget
from visattn.init.composed import Wanted, network_for
from visattn.init.division import Division, divide
from visattn.init.machine import Machine
from visattn.init.text import Line
from visattn.labels import Labels
from visattn.survey import LabelGuess, Survey, guess_label_map

_LR = 5e-4  # AdamW, PraNet, batches of 16
_DEEP = ("I", "I;16", "I;16B", "I;16L")
_FEW_LEVELS = 64


@dataclass(frozen=True)
class Plan:
    """All decisions.

    Args:
        survey: What the data set holds.
        machine: What the machine can do.
        guess: Labels and what they were guessed from.
        labels: The same as a label map.
        network: The network with its costs.
        budget: Size, batch and length of the training.
        division: What trains and what validates.
        channels: 3 for colour, 1 for grey.
        notes: What a person has to check.
    """

    survey: Survey
    machine: Machine
    guess: LabelGuess
    labels: Labels
    network: Network
    budget: Budget
    division: Division
    channels: Literal[1, 3]
    notes: tuple[str, ...]


def make_plan(found: Survey, machine: Machine, output: Path, wanted: Wanted | None = None) -> Plan:
    """Decide everything.

    Raises:
        UserError: No training could come of this data.
    """
    training = found.of("train")
    if len(training) + len(found.of("val")) < 2 or not training:
        raise UserError(
            f"{found.root}: {len(training)} image{'s' if len(training) != 1 else ''} with a readable mask of its size; "
            "training and validation need at least one each.\nSee what is wrong: visattn doctor DIR"
        )
    guess = guess_label_map((dict(pair.mask.values) for pair in found.usable), found.root.resolve().name)
    labels = Labels.from_config(guess.labels, None, guess.ignore)
    division = divide(found, output)
    channels: Literal[1, 3] = 1 if found.grey else 3
    network = network_for(labels, machine, channels, wanted=wanted)
    sizes = [pair.image.size for pair in found.usable if pair.image.size]
    budget = plan_budget(network, machine, sizes, division.training, division.validation)
    notes = (*guess.doubts, *division.notes, *_doubts(found))
    return Plan(found, machine, guess, labels, network, budget, division, channels, notes)


def recipe_lines(plan: Plan) -> list[Line]:
    """The recipe, line by line."""
    budget = plan.budget
    rate = _rate(budget.batch * budget.accumulate)
    size = budget.size[0] if budget.size[0] == budget.size[1] else list(budget.size)
    roots = [folder.path for part in ("train", "val") for folder in plan.survey.parts.get(part, ())]
    lines = [
        Line(0, "seed_everything", 0, "of weights, split, order and augmentation; the same number repeats the run"),
        Line(0, "model", opens=True),
        Line(1, "class_path", "SegmentationTask", "trains and scores a segmentation network"),
        Line(1, "init_args", opens=True),
        Line(2, "network", plan.network.arguments, _network_why(plan.network)),
        Line(2, "loss", *_loss(plan.labels)),
        Line(2, "optimizer", {"name": "adamw", "lr": rate, "weight_decay": 0.01}, _rate_why(budget)),
        Line(
            2, "schedule", {"name": "cosine", "warmup_epochs": _warmup(budget)}, "rises while norms settle, ends at 0"
        ),
        Line(0, "data", opens=True),
        Line(1, "class_path", "ImageMaskFolder", "reads folders of images and masks"),
        Line(1, "init_args", opens=True),
        Line(2, "root", _paths(roots), _counted(plan)),
        *_test_root(plan),
        Line(2, "labels", plan.guess.labels, _labels_why(plan)),
    ]
    if plan.guess.ignore is not None:
        lines.append(Line(2, "ignore", plan.guess.ignore, "pixels that count neither in loss nor in metrics"))
    lines += [
        Line(2, "channels", plan.channels, "no image has colour" if plan.channels == 1 else "images have colour"),
        *_normalisation(plan),
        Line(2, "size", size, budget.why["size"]),
        Line(2, "split", opens=True),
        *(Line(3, key, value, why) for key, (value, why) in plan.division.block.items()),
        Line(2, "augment", opens=True),
        *(Line(3, "-", entry, why) for entry, why in _augmentation(plan)),
        Line(2, "batch_size", budget.batch, budget.why["batch"]),
        Line(2, "num_workers", None, "a process for each free core, at most 8"),
        Line(2, "cache", True, "decoded images stay in memory if they fill less than half of it"),
        Line(0, "trainer", opens=True),
        Line(1, "max_epochs", budget.epochs, budget.why["epochs"]),
        Line(1, "precision", plan.machine.precision, precision_why(plan.machine)),
        Line(1, "gradient_clip_val", 1.0, "one odd batch cannot throw the weights far"),
    ]
    if budget.accumulate > 1:
        why = f"{budget.accumulate} x {budget.batch} images before the weights change, as more do not fit at once"
        lines.append(Line(1, "accumulate_grad_batches", budget.accumulate, why))
    if plan.machine.gpus > 1:
        lines.append(
            Line(1, "devices", 1, f"of {plan.machine.gpus}; batch_size counts on each, epochs were chosen for one")
        )
    return lines


def _network_why(network: Network) -> str:
    weights = not str(network.arguments.get("backbone", "va_")).startswith("va_")
    return network.why + ("; pretrained: true (a download) helps small sets" if weights else "")


def _loss(labels: Labels) -> tuple[dict[str, Any], str]:
    if labels.binary:
        why = "PraNet's for one class: cross-entropy and IoU, heavier near borders"
        return {"name": "structure", "pixel_weighted_bce": True}, why
    what = "regions that overlap" if labels.regions else "several classes"
    return {
        "name": "dice_ce"
    }, f"for {what}: Dice keeps small classes from being drowned, cross-entropy its gradients steady"


def _rate(images: int) -> float:
    """The learning rate for `images` in a step: with the root of their number, to two digits."""
    rate = _LR * math.sqrt(images / BATCH)
    return float(f"{rate:.1e}")


def _rate_why(budget: Budget) -> str:
    images = budget.batch * budget.accumulate
    if images == BATCH:
        return f"tried with {BATCH} images in a step; lower it if the loss jumps"
    return f"5e-4 for {BATCH} images in a step, less by the root of the number for {images}; lower it if the loss jumps"


def _warmup(budget: Budget) -> float:
    """Epochs of rising rate: a fiftieth of the run."""
    return max(1, round(0.02 * budget.epochs)) if budget.epochs >= 10 else round(0.1 * budget.epochs, 1)


def _augmentation(plan: Plan) -> list[tuple[dict[str, Any], str]]:
    several = len(plan.guess.labels) > 2
    mirror = (
        "if two labels are left and right, add swap_labels: [[LEFT, RIGHT]]"
        if several
        else "a mirrored image is as likely"
    )
    entries: list[tuple[dict[str, Any], str]] = [({"name": "flip_horizontal"}, mirror)]
    if plan.channels == 3:
        entries += [
            ({"name": "flip_vertical"}, "colour cameras look from any side; remove it where up and down matter"),
            (
                {"name": "affine", "rotate": 90, "scale": [0.75, 1.33], "shift": 0.1, "p": 0.9},
                "the same thing turned, nearer, farther, off the centre",
            ),
            (
                {"name": "colour", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.03, "p": 0.8},
                "other lamps and cameras; lower hue and saturation where a stain's colour matters",
            ),
        ]
    else:
        entries += [
            (
                {"name": "affine", "rotate": 20, "scale": [0.8, 1.25], "shift": 0.1, "p": 0.9},
                "grey images (ultrasound, X-ray, slices) stand upright; for microscopy rotate: 180 and flip_vertical",
            ),
            (
                {"name": "colour", "brightness": 0.3, "contrast": 0.3, "saturation": 0, "hue": 0, "p": 0.8},
                "other gains and exposures; there is no colour to change",
            ),
            (
                {"name": "noise", "std": _noise(plan), "p": 0.3},
                "other detectors; at most a fifth of the images' spread",
            ),
        ]
    if plan.division.training < 100:
        bend = {"name": "elastic", "strength": 0.02, "cells": 4, "p": 0.3}
        entries.insert(
            len(entries) - (1 if plan.channels == 3 else 2),
            (bend, f"few images ({plan.division.training}): soft tissue bends"),
        )
    return entries


def _noise(plan: Plan) -> list[float]:
    spread = plan.survey.brightness[1]
    return [round(0.05 * spread, 3), max(round(0.2 * spread, 3), 0.002)]


def _normalisation(plan: Plan) -> list[Line]:
    if plan.channels == 3:
        text = "ImageNet's, which pretrained weights expect"
        return [Line(2, "mean", None, text), Line(2, "std", None, text)]
    mean, std = plan.survey.brightness
    return [
        Line(2, "mean", [round(mean, 3)], "of these images, on a scale from 0 (black) to 1"),
        Line(2, "std", [max(round(std, 3), 0.01)], "of these images"),
    ]


def _labels_why(plan: Plan) -> str:
    values, total = plan.survey.values, sum(plan.survey.values.values())
    table: Counter[str] = Counter()
    names = {value: name for name, owned in zip(plan.labels.names, plan.labels.values, strict=True) for value in owned}
    for value, count in values.items():
        near = min(names, key=lambda known: abs(known - value))
        table[names[near]] += count if value not in plan.labels.ignore else 0
    shares = ", ".join(f"{name} {100 * table[name] / total:.2g} %" for name in plan.labels.names[1:7])
    return f"{plan.guess.why}; share of the pixels: {shares}. Rename as you like, the background first"


def _counted(plan: Plan) -> str:
    count = plan.division.training + plan.division.validation
    folders = sum(len(plan.survey.parts.get(part, ())) for part in ("train", "val"))
    where = f" in {folders} folders" if folders > 1 else ""
    return f"{count} images with masks{where}; relative paths count from where visattn is called"


def _test_root(plan: Plan) -> list[Line]:
    folders = [folder.path for folder in plan.survey.parts.get("test", ())]
    if not folders:
        return []
    parents = {path.parent for path in folders}
    together = len(folders) > 1 and len(parents) == 1
    paths = [parents.pop()] if together else folders
    return [Line(2, "test_root", _paths(paths), "for visattn test alone; never trained on")]


def _paths(paths: Sequence[Path]) -> str | list[str]:
    texts = [str(path) for path in paths]
    return texts[0] if len(texts) == 1 else texts


def precision_why(machine: Machine) -> str:
    """Why the machine's precision."""
    return {
        "bf16-mixed": "twice as fast and half the memory, with the range of float32",
        "16-mixed": "twice as fast and half the memory; this GPU has no bfloat16",
        "32-true": "what a CPU is fast at; bf16-mixed on a recent GPU"
        if machine.device == "cpu"
        else "the safe choice on this GPU",
    }[machine.precision]


def _doubts(found: Survey) -> list[str]:
    deep = [pair.image for pair in found.usable if pair.image.mode in _DEEP]
    high = max((facts.high for facts in deep), default=255)
    if deep and high < _FEW_LEVELS:
        return [
            f"16-bit images end at about {high * 257}: only {high + 1} grey levels are left; stretch them to 0..65535"
        ]
    return []
