"""`visattn doctor`: what is wrong with a data set, found before anything is trained on it. It needs no torch."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from visattn.data import DATA
from visattn.data.cases import Case, ImageFolder, scan_folder, scan_roots
from visattn.doctor import recipe as recipes
from visattn.doctor.class_sets import examine_class_recipe, examine_classes
from visattn.doctor.copies import check_copies
from visattn.doctor.files import check_files
from visattn.doctor.findings import Finding, Findings, printable
from visattn.doctor.groups import write_groups
from visattn.doctor.listing import check_folder
from visattn.doctor.masks import Classes, check_classes, check_mixed, check_swapped, check_values
from visattn.doctor.reading import Seen, read_cases
from visattn.doctor.show import Report, show
from visattn.doctor.volume_sets import examine_volume_recipe, examine_volumes, holds_volumes
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.recipe import resolve
from visattn.survey import find_parts, guess_label_map
from visattn.survey.classes import class_source

__all__ = ["Finding", "Report", "examine_folder", "examine_recipe", "run_doctor"]


def run_doctor(
    folder: Path | None,
    configs: Sequence[str] | None,
    rest: Sequence[str],
    as_json: bool = False,
    groups: Path | None = None,
) -> int:
    """Examine a folder or the data of a recipe and print what was found.

    Args:
        folder: A data set, or None.
        configs: Recipes, of which later ones lie over earlier ones; None without.
        rest: Changes of the recipe's keys, `--data.root DIR`.
        as_json: Print JSON.
        groups: Write a table of what belongs together here.

    Returns:
        1 if there is an error among the findings, else 0.

    Raises:
        UserError: Neither or both were given, or there is nothing to examine.
    """
    if (folder is None) == (not configs):
        raise UserError("doctor: give a folder, or a recipe with --config; not both\nSee: visattn doctor --help")
    try:
        report = examine_folder(folder) if folder is not None else examine_recipe(configs or (), rest)
    except PermissionError as error:  # of a folder; files that may not be read are findings
        raise UserError(f"{error.filename}: cannot be listed (permission denied)") from None
    show(report, as_json)
    if groups is not None:
        number = write_groups(groups, report.images, report.ties)
        print(f"{groups}: {number} groups; use --data.split.group_by {groups}:group", file=sys.stderr)
    return report.exit_code


def examine_folder(folder: Path | str) -> Report:
    """Examine the data set in `folder`; what the masks' values mean is guessed from them.

    Data to classify are class folders, a table (.csv), or a file of MedMNIST's form (.npz).

    Raises:
        UserError: There is no such folder, or no images with masks in it.
    """
    root = Path(folder).expanduser()
    if class_source(root) is not None:
        return examine_classes(folder)
    if holds_volumes(root):
        return examine_volumes(folder)
    found = find_parts(root)
    findings = Findings(root.absolute())
    cases: list[Case] = []
    parts: dict[str, str] = {}
    for names in (("train", "val"), ("test",)):
        inside = [(part, one) for part in names for one in found.get(part, ())]
        homes = {str(one.path.absolute()): part for part, one in inside}  # absolute: a folder may be called phantom
        listed = scan_roots(list(homes))[0] if inside else []
        for case in listed:
            case = replace(case, name=f"test/{case.name}") if names == ("test",) else case
            cases.append(case)
            if len(found) > 1:
                parts[case.name] = homes[case.root]
    folders = [scan_folder(one.path.absolute()) for group in found.values() for one in group]
    seen = _look(cases, folders, findings, None, None)
    check_mixed(seen, findings)
    labels = _guess(seen, root.resolve().name)
    if labels is None:
        _tell_constant(seen, findings)
    else:
        classes = check_values(seen, labels, findings, given=False)
        check_classes(seen, classes, labels, findings)
    ties = check_copies(seen, parts, {}, findings)
    recipes.check_names(cases, parts, findings)
    shown = None if labels is None else labels.to_config()["labels"]
    return Report([printable(str(folder))], cases, shown, True, findings.sorted(), ties)


def examine_recipe(configs: Sequence[str], rest: Sequence[str] = ()) -> Report:
    """Examine the data that a recipe names, divided as training would divide it.

    Raises:
        UserError: The recipe is no good, or a folder that it names is not there.
    """
    name, tree = resolve(configs, rest)
    if tree["data"]["class_path"] == DATA["VolumeFolder"]:
        return examine_volume_recipe(name, tree)
    if tree["data"]["class_path"] in (DATA["ImageFolder"], DATA["MedMNIST"]):
        return examine_class_recipe(name, tree)
    section = recipes.read_recipe(name, tree)
    for root in (*section.roots, *section.test_roots):
        if holds_volumes(Path(root).expanduser()):
            raise UserError(f"{root}: holds volumes; the recipe's data.class_path has to be VolumeFolder")
    cases, tests, folders = section.cases()
    findings = Findings(Path(section.roots[0]).expanduser() if len(section.roots) == 1 else None)
    tests = [replace(case, name=f"test/{case.name}") for case in tests]
    seen = _look([*cases, *tests], folders, findings, section.labels, section.size)
    classes = check_values(seen, section.labels, findings, given=True)
    check_classes(seen, classes, section.labels, findings)
    held = {name: _held(one) for name, one in classes.items()}
    parts: dict[str, str] = {}
    together = recipes.grouped(section, cases, findings) if cases else []
    if together:
        parts = recipes.parts_of(section, together, held, findings)
        recipes.check_parts(parts, held, section.labels, findings)
    if section.split.group_by is None:
        recipes.check_names(cases, parts, findings)
    parts |= {case.name: "test" for case in tests}
    recipes.check_sizes(section, seen, findings)
    ties = check_copies(seen, parts, {case.name: case.group for case in together}, findings)
    return Report(
        [printable(root) for root in section.roots + section.test_roots],
        [*cases, *tests],
        section.labels.to_config()["labels"],
        False,
        findings.sorted(),
        ties,
    )


def _look(
    cases: Sequence[Case],
    folders: Sequence[ImageFolder],
    findings: Findings,
    labels: Labels | None,
    size: tuple[int, int] | None,
) -> list[Seen]:
    """What is the same for a folder and a recipe: names, files, pictures."""
    for folder in folders:
        check_folder(folder, findings)
    if not cases:
        findings.whole("no-cases", ", ".join(findings.shown(folder.path) for folder in folders))
    seen = read_cases(cases, labels, size)
    check_files(seen, findings)
    check_swapped(seen, findings)
    return seen


def _held(classes: Classes) -> list[int]:
    return [index for index, count in enumerate(classes.pixels) if index and count]


def _guess(seen: Sequence[Seen], name: str) -> Labels | None:
    """The label map that the masks suggest; None where they hold one value, or none that labels could be."""
    contents = [one.content for one in seen if one.content is not None]
    masks: list[Mapping[int, int]] = [
        dict(zip(content.values.tolist(), content.counts.tolist(), strict=True)) for content in contents
    ]
    try:
        guess = guess_label_map(masks, name)
    except UserError:
        return None
    return Labels.from_config(guess.labels, ignore=guess.ignore)


def _tell_constant(seen: Sequence[Seen], findings: Findings) -> None:
    """Without a label map: all masks of one value, or values that are no labels."""
    values = {int(value) for one in seen if one.content is not None for value in one.content.values[:2]}
    if len(values) == 1:
        findings.whole("all-masks-empty", f"every pixel of all masks is {values.pop()}")
    elif values and not findings.has("folders-swapped"):
        for one in seen:
            if one.content is not None and len(one.content.values) > 2:
                findings.file("mask-no-labels", one.mask.path, f"{len(one.content.values)} values")
