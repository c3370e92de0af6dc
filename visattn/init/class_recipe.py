"""From what data to classify hold to every value of a recipe, each with its reason."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visattn.class_labels import ClassLabels
from visattn.errors import UserError
from visattn.init.budget import (
    BATCH,
    CPU_SECONDS,
    ONLY,
    Budget,
    Network,
    cpu_speed,
    duration,
    gpu_room,
    plan_budget,
)
from visattn.init.class_network import class_network, only_side, refusal
from visattn.init.class_survey import ClassSurvey
from visattn.init.composed import Wanted
from visattn.init.machine import Machine
from visattn.init.plan import precision_why
from visattn.init.text import Line, command
from visattn.survey import guess_group_by

_LR = 5e-4  # AdamW, batches of 16
_LARGEST = 224  # pixels: what networks for classification are made for
_EPOCHS3D = 60
_UNEQUAL = 10
_SHOWN = 6


@dataclass(frozen=True)
class ClassPlan:
    """All decisions.

    Args:
        survey: What the data hold.
        machine: What the machine can do.
        network: The network with its costs.
        budget: Size, batch and length of the training; of volumes the size is unused.
        split: Keys of `split` with value and reason; empty where the data are divided already.
        counts: Cases that train and that validate, roughly.
        notes: What a person has to check.
    """

    survey: ClassSurvey
    machine: Machine
    network: Network
    budget: Budget
    split: dict[str, tuple[Any, str]]
    counts: tuple[int, int]
    notes: tuple[str, ...]


def make_class_plan(found: ClassSurvey, machine: Machine, wanted: Wanted | None = None) -> ClassPlan:
    """Decide everything.

    Args:
        found: What the data hold.
        machine: What the machine can do.
        wanted: Network or attention instead of what is picked otherwise.

    Raises:
        UserError: No training could come of this data.
    """
    labels = ClassLabels.from_config(found.names, found.multi_label)
    split, counts, notes = _split(found)
    if min(counts) < 1:
        raise UserError(f"{found.root}: {found.total} images; training and validation need at least one each")
    channels = 1 if found.grey else 3
    network = class_network(labels, machine, channels, found.rank, wanted)
    if found.rank == 2:
        sizes = [_capped(size) for size, count in found.sizes.items() for _ in range(count)]
        budget = plan_budget(network, machine, sizes, *counts)
        if wanted and (why := refusal(network.arguments, channels, labels.channels, budget.size)):
            only = only_side(network)
            if only is None or budget.size == (only, only):
                raise UserError(f"--network {network.title}: {why}")
            budget = plan_budget(network, machine, sizes, *counts, only=only)
    else:
        budget = _volume_budget(found, network, machine, *counts)
        if wanted and (why := refusal(network.arguments, channels, labels.channels, max(found.sizes, key=math.prod))):
            raise UserError(f"--network {network.title}: {why}")
    most, least = max(found.counts.values()), min(found.counts[name] for name in found.names)
    if most > _UNEQUAL * least:
        notes.append("classes are very unequal: weigh the loss (class_weights), judge by balanced accuracy")
    return ClassPlan(found, machine, network, budget, split, counts, tuple(notes))


def class_recipe_lines(plan: ClassPlan) -> list[Line]:
    """The recipe, line by line."""
    budget, found = plan.budget, plan.survey
    images = budget.batch * budget.accumulate
    rate = float(f"{_LR * math.sqrt(images / BATCH):.1e}")
    lines = [
        Line(0, "seed_everything", 0, "of weights, split, order and augmentation; the same number repeats the run"),
        Line(0, "model", opens=True),
        Line(1, "class_path", "ClassificationTask", "trains and scores a classifier"),
        Line(1, "init_args", opens=True),
        Line(2, "network", plan.network.arguments, plan.network.why),
        Line(2, "loss", *_loss(found)),
        Line(2, "optimizer", {"name": "adamw", "lr": rate, "weight_decay": 0.05}, f"for {images} cases in a step"),
        Line(
            2, "schedule", {"name": "cosine", "warmup_epochs": _warmup(budget)}, "rises while norms settle, ends at 0"
        ),
        Line(0, "data", opens=True),
        *_source(plan),
        *_size(plan),
    ]
    if plan.split:
        lines.append(Line(2, "split", opens=True))
        lines += [Line(3, key, value, why) for key, (value, why) in plan.split.items()]
    lines.append(Line(2, "augment", opens=True))
    lines += [Line(3, "-", entry, why) for entry, why in _augmentation(found)]
    lines += [
        Line(2, "batch_size", budget.batch, budget.why["batch"]),
        Line(0, "trainer", opens=True),
        Line(1, "max_epochs", budget.epochs, budget.why["epochs"]),
        Line(1, "precision", plan.machine.precision, precision_why(plan.machine)),
        Line(1, "gradient_clip_val", 1.0, "one odd batch cannot throw the weights far"),
    ]
    if budget.accumulate > 1:
        why = f"{budget.accumulate} x {budget.batch} cases before the weights change, as more do not fit at once"
        lines.append(Line(1, "accumulate_grad_batches", budget.accumulate, why))
    return lines


def class_what(plan: ClassPlan) -> str:
    """What the recipe is for."""
    names = plan.survey.names
    return f"{plan.network.title} that tells {'; '.join(names[:4])}{' ...' if len(names) > 4 else ''} apart"


def class_data(plan: ClassPlan) -> str:
    """The data in a line."""
    found = plan.survey
    sizes = sorted(found.sizes, key=math.prod)
    shown = [" x ".join(map(str, size if found.rank == 3 else size[::-1])) for size in (sizes[0], sizes[-1])]
    span = f"all {shown[0]}" if len(sizes) == 1 else f"{shown[0]} to {shown[1]}"
    kind = "volumes" if found.rank == 3 else f"images, {'grey' if found.grey else 'colour'}"
    return f"{found.total} {kind}, {span} {'voxels' if found.rank == 3 else 'pixels'}"


def class_rows(plan: ClassPlan) -> list[tuple[str, str]]:
    """What was decided, for the terminal."""
    found, budget = plan.survey, plan.budget
    counted = [f"{name} {found.counts[name]}" for name in found.names]
    classes = "; ".join(counted[:_SHOWN]) + (f" and {len(counted) - _SHOWN} more" if len(counted) > _SHOWN else "")
    size = "" if found.rank == 3 else f", {budget.size[1]} x {budget.size[0]} pixels"
    accumulate = f" x {budget.accumulate}" if budget.accumulate > 1 else ""
    kept = "as the data are divided" if not plan.split else "divided by the recipe"
    several = " (several at once)" if found.multi_label else ""
    return [
        ("data", class_data(plan)),
        ("classes", classes + several),
        ("split", f"{plan.counts[0]} train, {plan.counts[1]} validate, {kept}"),
        ("machine", plan.machine.described),
        ("network", f"{plan.network.title}{size}, batches of {budget.batch}{accumulate}, {plan.machine.precision}"),
        ("training", f"{budget.epochs} epochs, about {duration(budget.seconds)}"),
    ]


def class_commands(plan: ClassPlan, output: Path) -> list[str]:
    """What comes next."""
    run, found = f"runs/{output.stem}/TIME", plan.survey
    inputs = ["IMAGES"] if found.flag is None else [str(found.root), "--split", "test"]
    return [
        command("visattn", "doctor", str(found.root)),
        command("visattn", "fit", "--config", str(output)),
        command("visattn", "predict", *inputs, "--checkpoint", run, "--output", "predictions"),
    ]


def _capped(size: tuple[int, ...]) -> tuple[int, int]:
    scale = min(1.0, _LARGEST / math.sqrt(size[0] * size[1]))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _split(found: ClassSurvey) -> tuple[dict[str, tuple[Any, str]], tuple[int, int], list[str]]:
    """The `split` block, how many cases train and validate, and notes."""
    if found.cases.get("val"):
        return {}, (found.cases.get("train", 0), found.cases["val"]), []
    rest = found.total - found.cases.get("test", 0)
    share = 0.1 if rest >= 1000 else 0.15 if rest >= 200 else 0.2
    validating = max(1, round(share * rest))
    split: dict[str, tuple[Any, str]] = {
        "val": (share, f"about {validating} of {rest} images, on which the best epoch is chosen"),
    }
    notes = []
    if not found.cases.get("test"):
        split["test"] = (0.0, "for scores on images that nothing was chosen by, set a share aside")
    guess = None if found.grouped or len(found.stems) < 2 else guess_group_by(found.stems)
    if guess is not None:
        split["group_by"] = (guess[0], f"{guess[1]}, none of which is on both sides of the split")
    elif not found.grouped:
        notes.append("nothing in the names tells which images show one patient; if some do, set data.split.group_by")
    return split, (rest - validating, validating), notes


def _volume_budget(found: ClassSurvey, network: Network, machine: Machine, training: int, validation: int) -> Budget:
    """Batch and epochs for volumes, which are trained as they are."""
    voxels = max(math.prod(size) for size in found.sizes)
    batch, accumulate = min(BATCH, max(2, training // 8)), 1
    if machine.device == "cpu":
        each = network.seconds[0] + network.seconds[1] * voxels / 1e6
        epoch = (training + 0.35 * validation) * each / cpu_speed(machine)
        epochs = max(1, min(_EPOCHS3D, int(CPU_SECONDS / epoch)))
        why = "enough for a first result" if epochs == _EPOCHS3D else "what this machine can do in half an hour"
    else:
        fits = int(gpu_room(network, machine) / (network.pixel_bytes * voxels))
        while batch > max(2, fits):
            batch, accumulate = batch // 2, accumulate * 2
        # An H200 takes some two hundred times less than a core; others are slower, and loading takes its part.
        epoch, epochs = training * network.seconds[1] * voxels / 1e6 / 50, _EPOCHS3D
        why = "as in recipes/medmnist3d_pyramid.yaml"
    reasons = {
        "batch": f"{max(1, training // batch)} steps an epoch",
        "epochs": f"about {duration(epochs * epoch)}: {why}",
    }
    return Budget((0, 0), batch, accumulate, epochs, epochs * epoch, reasons)


def _loss(found: ClassSurvey) -> tuple[dict[str, Any], str]:
    if found.multi_label:
        return {"name": "bce"}, "an image may have several labels: a yes or no for each"
    return {"name": "cross_entropy", "label_smoothing": 0.1}, "smoothing keeps probabilities from running to 0 and 1"


def _warmup(budget: Budget) -> int:
    return max(1, round(0.05 * budget.epochs)) if budget.epochs > 4 else 0


def _source(plan: ClassPlan) -> list[Line]:
    found = plan.survey
    where = "relative paths count from where visattn is called"
    if found.flag is None:
        lines = [
            Line(1, "class_path", "ImageFolder", "reads images with classes, from folders or a table"),
            Line(1, "init_args", opens=True),
            Line(2, "root", str(found.root), f"{found.total} images; {where}"),
            Line(2, "labels", list(found.names), "the order of the outputs; rename folder or table to rename them"),
        ]
        if found.multi_label:
            lines.append(Line(2, "multi_label", True, "| stands between the labels of an image"))
        return lines
    lines = [
        Line(1, "class_path", "MedMNIST", "reads MedMNIST's files, and others of their form"),
        Line(1, "init_args", opens=True),
        Line(2, "root", str(found.root), f"{found.total} cases; {where}"),
    ]
    if found.flag:
        return [*lines, Line(2, "flag", found.flag, "task and names of the classes come with it")]
    task = "multi-label" if found.multi_label else "multi-class"
    return [
        *lines,
        Line(2, "task", task, "as the form of the labels tells; the file's name is none of MedMNIST's"),
        Line(2, "labels", list(found.names), "numbers, as the file has no names: rename them, in their order"),
    ]


def _size(plan: ClassPlan) -> list[Line]:
    found, budget = plan.survey, plan.budget
    if found.rank == 3:
        return [Line(2, "size", None, "volumes as they are")]
    size = budget.size[0] if budget.size[0] == budget.size[1] else list(budget.size)
    channels = 1 if found.grey else 3
    small = max(max(side) for side in found.sizes) < min(budget.size)
    why = "enlarged, so that the network's last maps are more than one pixel" if small else budget.why["size"]
    if budget.why["size"] == ONLY:
        why = ONLY
    elif min(math.sqrt(math.prod(side)) for side in found.sizes) > _LARGEST:
        why = f"the images are larger; {_LARGEST} is what such networks are made for, raise it if fine details decide"
    return [
        Line(2, "size", size, why),
        Line(2, "channels", channels, "no image has colour" if channels == 1 else "images have colour"),
    ]


def _augmentation(found: ClassSurvey) -> list[tuple[dict[str, Any], str]]:
    if found.rank == 3:
        return [
            ({"name": "mirror"}, "remove it where left and right matter"),
            (
                {"name": "affine", "rotate": 30, "scale": [0.8, 1.25], "p": 0.5},
                "the same thing turned, nearer, farther",
            ),
            ({"name": "noise"}, "other scanners"),
        ]
    entries: list[tuple[dict[str, Any], str]] = [
        ({"name": "random_resized_crop", "scale": [0.6, 1.0]}, "the same thing nearer and off the centre"),
        ({"name": "flip_horizontal"}, "a mirrored image is as likely; remove it where left and right matter"),
    ]
    if found.grey:
        change = {"name": "colour", "brightness": 0.2, "contrast": 0.2, "saturation": 0, "hue": 0, "p": 0.5}
        return [*entries, (change, "other gains and exposures; there is no colour to change")]
    change = {"name": "colour", "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.02, "p": 0.5}
    return [*entries, (change, "other lamps and cameras; lower hue and saturation where a stain's colour matters")]
