"""From what a data set of volumes holds to every value of a recipe, each with its reason."""

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visattn.errors import UserError
from visattn.init.budget import duration
from visattn.init.composed import Wanted
from visattn.init.machine import Machine
from visattn.init.plan import precision_why
from visattn.init.text import Line
from visattn.init.volume_budget import VolumeBudget, affordable_spacing, plan_volume_budget
from visattn.init.volume_survey import VolumeSurvey
from visattn.labels import Labels
from visattn.survey import guess_group_by

_SHOWN = 6


@dataclass(frozen=True)
class VolumePlan:
    """All decisions.

    Args:
        survey: What the data set holds.
        machine: What the machine can do.
        labels: The label map.
        spacing: Voxel size in mm along R, A, S.
        budget: Network, patch, batch and length.
        split: Keys of `split` with value and reason.
        counts: Cases that train and that validate, roughly.
        notes: What a person has to check.
    """

    survey: VolumeSurvey
    machine: Machine
    labels: Labels
    spacing: list[float]
    budget: VolumeBudget
    split: dict[str, tuple[Any, str]]
    counts: tuple[int, int]
    notes: tuple[str, ...]

    @property
    def coarse(self) -> bool:
        """Whether the spacing is coarser than that of the volumes, for the machine's sake."""
        return tuple(self.spacing) != self.survey.spacing


def make_volume_plan(found: VolumeSurvey, machine: Machine, wanted: Wanted | None = None) -> VolumePlan:
    """Decide everything.

    Raises:
        UserError: The labels make no sense.
    """
    labels = Labels.from_config(found.guess.labels, found.regions, found.guess.ignore)
    split, counts, notes = _split(found)
    sizes = found.sizes()
    spacing = affordable_spacing(machine, sizes, found.spacing)
    sizes = np.maximum(1, np.round(sizes * np.array(found.spacing) / np.array(spacing)))
    budget = plan_volume_budget(labels, machine, sizes, spacing, *counts, len(found.scan.channels), wanted)
    return VolumePlan(
        found, machine, labels, spacing, budget, split, counts, (*found.guess.doubts, *notes, *_sides(labels)[1])
    )


def volume_recipe_lines(plan: VolumePlan) -> list[Line]:
    """The recipe, line by line."""
    budget, found = plan.budget, plan.survey
    deep = budget.network.arguments.get("deep_supervision")  # of unet3d: a head at each level but the lowest two
    loss: dict[str, Any] = {"name": "dice_ce"}
    if deep:
        loss["deep_supervision"] = _weights(len(budget.network.arguments["filters"]) - 2)
    lines = [
        Line(0, "seed_everything", 0, "of weights, split, order and augmentation; the same number repeats the run"),
        Line(0, "model", opens=True),
        Line(1, "class_path", "SegmentationTask", "trains and scores a segmentation network"),
        Line(1, "init_args", opens=True),
        Line(2, "network", budget.network.arguments, _network_why(plan)),
        Line(2, "loss", loss, "Dice keeps small things from being drowned, cross-entropy its gradients steady"),
        *_optimizer(plan),
        Line(0, "data", opens=True),
        Line(1, "class_path", "VolumeFolder", "reads volumes with label volumes"),
        Line(1, "init_args", opens=True),
        Line(2, "root", str(found.root), _counted(plan)),
    ]
    if found.layout != "auto":
        lines.append(Line(2, "layout", found.layout, "files of each case, found by their names"))
    lines.append(Line(2, "labels", found.guess.labels, _labels_why(plan)))
    if found.regions:
        lines.append(Line(2, "regions", dict(found.regions), "overlapping, the outermost first; as dataset.json says"))
    if found.guess.ignore is not None:
        lines.append(Line(2, "ignore", found.guess.ignore, "voxels that count neither in loss nor in metrics"))
    lines += [
        Line(2, "channels", list(found.scan.channels), "in this order; predict wants them so too"),
        Line(2, "orientation", "RAS", "all numbers of three below are along right, anterior, superior"),
        Line(2, "spacing", plan.spacing, _spacing_why(plan)),
        Line(2, "patch", list(budget.patch), budget.why["patch"]),
        Line(2, "crop_foreground", found.crop, f"the margin is {100 * found.margin:.0f} % of a typical volume"),
        Line(2, "normalise", *_normalise(found)),
        Line(2, "split", opens=True),
        *(Line(3, key, value, why) for key, (value, why) in plan.split.items()),
        Line(2, "augment", opens=True),
        *(Line(3, "-", entry, why) for entry, why in _augmentation(plan)),
        Line(2, "batch_size", budget.batch, budget.why["batch"]),
        Line(2, "iterations_per_epoch", budget.iterations, "an epoch is so many steps, however many cases there are"),
        Line(2, "oversample", 0.33, "share of the patches whose middle lies on foreground, of a class drawn evenly"),
        Line(2, "num_workers", None, "a process for each free core, at most 8"),
        Line(0, "trainer", opens=True),
        Line(1, "max_epochs", budget.epochs, budget.why["epochs"]),
        Line(1, "check_val_every_n_epoch", budget.validate_every, budget.why["validation"]),
        Line(1, "precision", plan.machine.precision, precision_why(plan.machine)),
        Line(1, "gradient_clip_val", 12.0, "one odd batch cannot throw the weights far"),
    ]
    if plan.machine.gpus > 1:
        lines.append(Line(1, "devices", 1, f"of {plan.machine.gpus}; batch_size counts on each"))
    return lines


def volume_rows(plan: VolumePlan) -> list[tuple[str, str]]:
    """What was decided, in a few lines for the terminal."""
    budget = plan.budget
    values = ", ".join(f"{name} {value}" for name, value in list(plan.survey.guess.labels.items())[:_SHOWN])
    more = ", ..." if len(plan.survey.guess.labels) > _SHOWN else ""
    train, validate = plan.counts
    told = ", ".join(why for _, why in [plan.split.get("group_by", ("", ""))] if why)
    arguments = budget.network.arguments
    own = f" ({arguments['backbone']})" if "backbone" in arguments else ""
    network = f"U-Net of {len(arguments['filters'])} levels" if "filters" in arguments else budget.network.title + own
    network += f", windows of {_times(budget.patch)} voxels"
    return [
        ("data", described(plan)),
        ("labels", f"{values}{more}: {plan.survey.guess.why}"),
        ("split", f"{train} volumes train, {validate} validate{'; ' + told if told else ''}"),
        ("machine", plan.machine.described),
        ("grid", f"voxels of {_times(plan.spacing)} mm{', coarser than the volumes' if plan.coarse else ''}"),
        ("network", f"{network}, batches of {budget.batch}, {plan.machine.precision}"),
        ("training", f"{budget.epochs} epochs of {budget.iterations} steps, about {duration(budget.seconds)}"),
    ]


def described(plan: VolumePlan) -> str:
    """The volumes in a line."""
    found = plan.survey
    shapes = sorted((one.geometry.shape for one in found.seen), key=lambda shape: shape[0] * shape[1] * shape[2])
    smallest, largest = _times(shapes[0]), _times(shapes[-1])
    span = f"{smallest} to {largest}" if smallest != largest else f"all {smallest}"
    channels = f"{len(found.scan.channels)} channel{'s' if len(found.scan.channels) > 1 else ''}"
    kinds = Counter(one.geometry.orientation for one in found.seen)
    axes = "/".join(kind for kind, _ in kinds.most_common(3)) + ("/..." if len(kinds) > 3 else "")
    return (
        f"{len(found.seen)} volumes with labels, {span} voxels, {axes}, {channels} ({', '.join(found.scan.channels)})"
    )


def volume_commands(plan: VolumePlan, output: Path) -> list[str]:
    """Doctor, fit and predict, as one types them."""
    words = [
        ("visattn", "doctor", str(plan.survey.root)),
        ("visattn", "fit", "--config", str(output)),
        ("visattn", "predict", "SCANS", "--checkpoint", f"runs/{output.stem}/TIME", "--output", "masks", "--overlays"),
    ]
    return [shlex.join(line) for line in words]


def volume_problems(plan: VolumePlan) -> list[str]:
    """What training would refuse."""
    problems = list(plan.survey.problems)
    for one in plan.survey.seen:
        try:
            plan.labels.encode(np.array(list(one.values)), str(one.case.label))
        except UserError as error:
            problems.append(str(error).splitlines()[0])
    return problems


def _split(found: VolumeSurvey) -> tuple[dict[str, tuple[Any, str]], tuple[int, int], tuple[str, ...]]:
    count = len(found.seen)
    share = 0.2 if count >= 20 else 0.25
    validating = max(1, round(share * count))
    if found.scan.splits is not None:
        validating = max(1, round(0.2 * count))
        why = f"the first of the folds in {found.scan.splits.name}, which lies with the data; --folds all trains all"
        return {"fold": (0, why)}, (count - validating, validating), ()
    block: dict[str, tuple[Any, str]] = {
        "val": (share, f"about {validating} of {count} volumes, on which the best epoch is chosen"),
        "test": (0.0, "for scores on volumes that nothing was chosen by, set a share aside or give test_root"),
    }
    groups = {one.case.group for one in found.seen}
    if len(groups) < count:
        block["group_by"] = (None, f"the folders name {len(groups)} subjects, whose volumes stay together")
        return block, (count - validating, validating), ()
    named = guess_group_by([one.case.name for one in found.seen])
    if named is None:
        return (
            block,
            (count - validating, validating),
            ("if several volumes show one patient, set data.split.group_by",),
        )
    block["group_by"] = (named[0], f"{named[1]}, none of which is on both sides of the split")
    return block, (count - validating, validating), ()


def _weights(heads: int) -> list[float]:
    """Half as much for each coarser output, 1 in all."""
    halves = [0.5**level for level in range(heads)]
    return [round(weight / sum(halves), 3) for weight in halves]


def _network_why(plan: VolumePlan) -> str:
    thick = max(plan.spacing) / min(plan.spacing)
    shape = "" if "strides" not in plan.budget.network.arguments else "; strides and kernels follow the patch's shape"
    if shape and thick >= 2:
        shape = (
            f"; voxels are {thick:.1f} times as thick as wide: not mixed along that axis until the others are as coarse"
        )
    return plan.budget.network.why + shape


def _optimizer(plan: VolumePlan) -> list[Line]:
    if plan.budget.network.arguments["name"] != "unet3d":
        rate = 1e-3 if plan.machine.device == "cpu" else 5e-4
        return [
            Line(2, "optimizer", {"name": "adamw", "lr": rate, "weight_decay": 0.01}, "attention learns little by SGD"),
            Line(2, "schedule", {"name": "cosine", "warmup_epochs": 1}, "rises while norms settle, ends at 0"),
        ]
    if plan.machine.device == "cpu":
        return [
            Line(2, "optimizer", {"name": "adamw", "lr": 3e-3, "weight_decay": 0.01}, "fast where steps are few"),
            Line(2, "schedule", {"name": "cosine", "warmup_epochs": 1}, "rises while norms settle, ends at 0"),
        ]
    value = {"name": "sgd", "lr": 0.01, "momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}
    return [
        Line(2, "optimizer", value, "nnU-Net's"),
        Line(2, "schedule", {"name": "poly"}, "nnU-Net's: falls to 0 almost in a line"),
    ]


def _counted(plan: VolumePlan) -> str:
    layout = "by these patterns" if plan.survey.layout != "auto" else f"in the layout '{plan.survey.scan.layout}'"
    return f"{len(plan.survey.seen)} volumes with labels {layout}; relative paths count from where visattn is called"


def _labels_why(plan: VolumePlan) -> str:
    counts: Mapping[int, int] = plan.survey.foreground
    total = sum(counts.values())
    owned = zip(plan.labels.names[1:7], plan.labels.values[1:7], strict=True)
    shares = ", ".join(f"{name} {100 * sum(counts.get(v, 0) for v in values) / total:.2g} %" for name, values in owned)
    return f"{plan.survey.guess.why}; share of the voxels: {shares}. Rename as you like, the background first"


def _spacing_why(plan: VolumePlan) -> str:
    own = f"mm; the median of all volumes{'' if not plan.coarse else f' is {_times(plan.survey.spacing)}'}"
    thick = max(plan.survey.spacing) / min(plan.survey.spacing)
    own += ", of the thickest axis the 10th percentile" if thick > 3 else ""
    return f"{own}, but that many voxels take long on {plan.machine.described}" if plan.coarse else own


def _normalise(found: VolumeSurvey) -> tuple[Any, str]:
    methods = ["ct" if found.ct(channel) else "zscore" for channel in range(len(found.scan.channels))]
    said = {
        "ct": "CT: clipped to what foreground shows in the training cases",
        "zscore": "the units of MRI mean nothing: mean 0, deviation 1 for each volume",
    }
    reason = "; ".join(said[name] for name in dict.fromkeys(methods))
    return (methods[0] if len(set(methods)) == 1 else methods), reason


def _augmentation(plan: VolumePlan) -> list[tuple[dict[str, Any], str]]:
    pairs, _ = _sides(plan.labels)
    mirror: dict[str, Any] = {"name": "mirror"}
    why = "a mirrored body is as likely; remove it where left and right are told apart by labels"
    if pairs:
        mirror |= {"axes": [0], "swap_labels": pairs}
        why = "left and right change places with their labels"
    return [
        ({"name": "affine", "rotate": 30, "scale": [0.7, 1.4], "p": 0.35}, "turned, smaller and larger"),
        ({"name": "noise"}, "other scanners"),
        ({"name": "blur"}, "softer images"),
        ({"name": "intensity"}, "brighter, darker, flatter"),
        ({"name": "low_resolution"}, "coarser scans"),
        ({"name": "gamma"}, "other contrasts"),
        (mirror, why),
    ]


def _sides(labels: Labels) -> tuple[list[list[str]], tuple[str, ...]]:
    """Pairs of labels of the two sides, and what to check where there may be some that names do not tell."""
    pairs = []
    for name in labels.names[1:]:
        for left, right in (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT")):
            other = name.replace(left, right)
            if left in name and other in labels.names:
                pairs.append([name, other])
    told = len(labels.names) > 2 and not pairs
    return pairs, ("if two labels are left and right of one thing, take augment's mirror away",) if told else ()


def _times(numbers: Any) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
