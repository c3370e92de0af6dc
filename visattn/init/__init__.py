"""`visattn init`: looks at a data set and at this machine, and writes a recipe that trains on it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from visattn import __version__
from visattn.data.medmnist_file import case_rank, case_shape
from visattn.doctor.volume_sets import holds_volumes
from visattn.errors import UserError
from visattn.files import write_text_atomic
from visattn.init.budget import duration
from visattn.init.class_network import class_arguments
from visattn.init.class_recipe import (
    class_commands,
    class_data,
    class_recipe_lines,
    class_rows,
    class_what,
    make_class_plan,
)
from visattn.init.class_survey import survey_classes
from visattn.init.composed import Wanted, wanted_arguments
from visattn.init.division import look
from visattn.init.machine import Machine, this_machine
from visattn.init.plan import Plan, make_plan, recipe_lines
from visattn.init.text import Line, command, one_line, render
from visattn.init.volume_recipe import (
    described,
    make_volume_plan,
    volume_commands,
    volume_problems,
    volume_recipe_lines,
    volume_rows,
)
from visattn.init.volume_survey import survey_volumes
from visattn.labels import Labels
from visattn.progress import Bar
from visattn.survey import Survey, find_parts, survey
from visattn.survey.classes import class_source

_SHOWN = 4

__all__ = ["write_recipe"]


def write_recipe(
    folder: Path,
    output: Path,
    overwrite: bool = False,
    machine: Machine | None = None,
    wanted: Wanted | None = None,
) -> int:
    """Write a recipe for the data in `folder` to `output`, and print what was decided.

    Args:
        folder: The data set.
        output: The recipe to write; a file that goes with it stands beside it, under its name.
        overwrite: Replace files that are there.
        machine: What to plan for; by default this machine.
        wanted: Network, attention or backbone instead of what is picked otherwise.

    Returns:
        0, or 1 where files must be put right before the recipe trains.

    Raises:
        UserError: The data cannot be trained on, or a file is in the way; nothing is written then.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: a recipe's name ends in .yaml")
    _refuse([output], overwrite)
    machine = machine or this_machine()
    classes = class_source(folder.expanduser()) is not None
    volumes = not classes and holds_volumes(folder.expanduser())
    if wanted and classes:
        _check_classifier(wanted, machine, folder.expanduser())
    elif wanted:
        wanted_arguments(wanted, 3 if volumes else 2, machine)  # before the data are looked at, which takes longer
    if classes:
        draft = _draft_classes(folder, machine, output, wanted)
    else:
        draft = (_draft_volumes if volumes else _draft_images)(folder, machine, output, wanted)
    _refuse(list(draft.files), overwrite)
    for path, content in draft.files.items():
        write_text_atomic(path, content)
    write_text_atomic(output, render(_head(draft), draft.lines))
    rows = [*draft.rows, *(("check", note) for note in draft.notes)]
    rows.append(("wrote", ", ".join(str(path) for path in (output, *draft.files))))
    print("\n".join(f"{title:9} {one_line(text)}" for title, text in rows))
    _tell_problems(draft.problems, folder)
    print("Next:\n" + "\n".join(f"  {line}" for line in draft.commands))
    return 1 if draft.problems else 0


@dataclass(frozen=True)
class _Draft:
    """What is written and told.

    Args:
        what: What the recipe is for.
        lines: The recipe.
        files: Further files.
        machine: What was planned for.
        seconds: The time that training takes.
        data: The data in a line.
        rows: What was decided, for the terminal.
        notes: What a person has to check.
        problems: What has to be put right first.
        commands: What comes next.
    """

    what: str
    lines: list[Line]
    files: dict[Path, str]
    machine: Machine
    seconds: float
    data: str
    rows: list[tuple[str, str]]
    notes: tuple[str, ...]
    problems: list[str]
    commands: list[str]


def _draft_images(folder: Path, machine: Machine, output: Path, wanted: Wanted | None) -> _Draft:
    found = _look(folder)
    plan = make_plan(found, machine, output, wanted)
    return _Draft(
        _what(plan.network.title, plan.labels), recipe_lines(plan), plan.division.files, machine, plan.budget.seconds,
        _images(plan), _rows(plan), plan.notes, [*found.unpaired, *found.unreadable, *_mismatches(plan)],
        _next(plan, output),
    )  # fmt: skip


def _draft_volumes(folder: Path, machine: Machine, output: Path, wanted: Wanted | None) -> _Draft:
    plan = make_volume_plan(survey_volumes(folder), machine, wanted)
    return _Draft(
        _what(plan.budget.network.title, plan.labels), volume_recipe_lines(plan), {}, machine, plan.budget.seconds,
        described(plan), volume_rows(plan), plan.notes, volume_problems(plan), volume_commands(plan, output),
    )  # fmt: skip


def _check_classifier(wanted: Wanted, machine: Machine, folder: Path) -> None:
    """Refuse a network before the data are looked at, which takes longer."""
    class_arguments(wanted, machine, case_rank(case_shape(folder)) if class_source(folder) == "arrays" else 2)


def _draft_classes(folder: Path, machine: Machine, output: Path, wanted: Wanted | None) -> _Draft:
    plan = make_class_plan(survey_classes(folder), machine, wanted)
    return _Draft(
        class_what(plan), class_recipe_lines(plan), {}, machine, plan.budget.seconds, class_data(plan),
        class_rows(plan), plan.notes, list(plan.survey.problems), class_commands(plan, output),
    )  # fmt: skip


def _look(folder: Path) -> Survey:
    total = sum(len(one.pairs) for folders in find_parts(folder).values() for one in folders)
    with Bar("looking at images and masks", total) as bar:
        return survey(folder, lambda _: bar.advance(), look)


def _refuse(paths: list[Path], overwrite: bool) -> None:
    for path in paths:
        if path.is_dir():
            raise UserError(f"--output {path}: is a folder; give the name of a file in it")
        if path.exists() and not overwrite:
            raise UserError(f"--output {path}: is there already; give another name, or --overwrite to replace it")


def _mismatches(plan: Plan) -> list[str]:
    """Sizes that differ, and masks that the label map cannot read."""
    lines = []
    for pair in plan.survey.unequal:
        (h, w), (height, width) = pair.mask.size or (0, 0), pair.image.size or (0, 0)
        lines.append(f"{pair.mask.path}: the mask is {w} x {h} pixels, its image {width} x {height}")
    for pair in plan.survey.usable:
        try:
            plan.labels.encode(np.array([value for value, _ in pair.mask.values]), str(pair.mask.path))
        except UserError as error:
            lines.append(str(error).splitlines()[0])
    return lines


def _what(title: str, labels: Labels) -> str:
    named = " and ".join(labels.foreground[:4]) + (" ..." if len(labels.foreground) > 4 else "")
    return f"{title} for {named}"


def _head(draft: _Draft) -> list[str]:
    titles = ("Check:", "Command:", "Then:")
    return [
        f"{draft.what}: written by visattn init {__version__}, to be read and changed",
        "",
        *(f"{title:9} {line}" for title, line in zip(titles, draft.commands, strict=True)),
        f"Hardware: {draft.machine.described}",
        f"Time:     about {duration(draft.seconds)} on this machine",
        f"Data:     {draft.data}",
        *(f"Mind:     {note}" for note in draft.notes),
    ]


def _next(plan: Plan, output: Path) -> list[str]:
    run = f"runs/{output.stem}/TIME"
    return [
        command("visattn", "doctor", str(plan.survey.root)),
        command("visattn", "fit", "--config", str(output)),
        command("visattn", "predict", "IMAGES", "--checkpoint", run, "--output", "masks", "--overlays"),
    ]


def _images(plan: Plan) -> str:
    sizes = sorted(plan.survey.sizes, key=lambda size: size[0] * size[1])
    smallest, largest = (f"{width} x {height}" for height, width in (sizes[0], sizes[-1]))
    span = f"{smallest} to {largest}" if smallest != largest else f"all {smallest}"
    kind = "colour" if plan.channels == 3 else "grey"
    kinds = "/".join(sorted(plan.survey.modes))
    return f"{len(plan.survey.usable)} images with masks, {span} pixels, {kind} ({kinds})"


def _rows(plan: Plan) -> list[tuple[str, str]]:
    budget = plan.budget
    labels = ", ".join(f"{name} {value}" for name, value in list(plan.guess.labels.items())[:8])
    accumulate = f" x {budget.accumulate}" if budget.accumulate > 1 else ""
    parts = plan.division
    split = f"{parts.training} images train, {parts.validation} validate" + (f"; {parts.told}" if parts.told else "")
    backbone = plan.network.arguments.get("backbone")
    network = plan.network.title + (f" ({backbone})" if backbone else "")
    network += f", {budget.size[1]} x {budget.size[0]} pixels"
    return [
        ("data", _images(plan)),
        ("labels", f"{labels}: {plan.guess.why}"),
        ("split", split),
        ("machine", plan.machine.described),
        ("network", f"{network}, batches of {budget.batch}{accumulate}, {plan.machine.precision}"),
        ("training", f"{budget.epochs} epochs, about {duration(budget.seconds)}"),
    ]


def _tell_problems(problems: list[str], folder: Path) -> None:
    if not problems:
        return
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    head = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} to put right before training starts:"
    lines = [head, *(f"- {one_line(problem)[:300]}" for problem in problems[:_SHOWN]), *more]
    print(
        "\n".join([*lines, f"All of them, with what to do: {command('visattn', 'doctor', str(folder))}"]),
        file=sys.stderr,
    )
