"""Data sets to classify as a whole: class folders, tables, MedMNIST's files, and recipes with them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from visattn.data import DATA
from visattn.data.cases import Case
from visattn.data.class_cases import LabelledCase, divide
from visattn.data.class_files import Row, list_folders, list_table
from visattn.data.class_phantom import PHANTOM_CLASSES, draw_phantom
from visattn.data.images import SUFFIXES
from visattn.data.medmnist_file import count_classes, find_file, flag_of, read_arrays
from visattn.data.medmnist_flags import FLAGS, KINDS, MULTI_LABEL
from visattn.data.phantoms import PHANTOM
from visattn.data.splits import PARTS, Split, find_groups
from visattn.doctor import recipe as recipes
from visattn.doctor.class_reading import Images, look_at_arrays, look_at_files
from visattn.doctor.copies import check_copies
from visattn.doctor.files import check_file, check_image, check_together
from visattn.doctor.findings import Findings, printable
from visattn.doctor.listing import check_names
from visattn.doctor.reading import Seen
from visattn.doctor.show import Report
from visattn.errors import UserError, unknown
from visattn.files import walk_files
from visattn.recipe import check_keys

KEYS: dict[str, dict[str, Any]] = {
    "ImageFolder": {
        "root": None, "labels": None, "multi_label": False, "size": 224, "crop": None, "split": None, "augment": None,
        "batch_size": 32, "channels": 3, "mean": None, "std": None, "num_workers": None, "repeats": 1, "seed": 0,
    },
    "MedMNIST": {
        "root": None, "flag": None, "native": 28, "labels": None, "task": None, "size": None, "channels": None,
        "mean": None, "std": None, "split": None, "augment": None, "batch_size": 32, "num_workers": None, "seed": 0,
    },
}  # fmt: skip
"""The arguments of the data modules and their defaults; a test compares the two."""

_UNEQUAL = 10
_FEW_VALIDATION = 5
_SHOWN = 12


@dataclass
class ClassSet:
    """Data to classify, as they were found.

    Args:
        shown: What was examined, as the user named it.
        names: The classes.
        cases: Cases whose class is known.
        images: The arrays of an .npz file or the phantom, by part; None where each image is a file.
        split: How the recipe divides the cases; None where it does not.
        seed: Of the division.
        batch_size: Cases in a step; 0 without a recipe.
        grouped: Whether the data or the recipe say which cases belong together.
        divided: Whether there is a division: that of the data, or that of a recipe.
    """

    shown: str
    names: tuple[str, ...]
    cases: list[LabelledCase]
    images: Images | None = None
    split: Split | None = None
    seed: int = 0
    batch_size: int = 0
    grouped: bool = False
    divided: bool = field(default=True)


def examine_classes(path: Path | str) -> Report:
    """Examine class folders, a table or an .npz file.

    Raises:
        UserError: There is nothing to examine.
    """
    root = Path(path).expanduser()
    findings = Findings((root if root.is_dir() else root.parent).absolute())
    if root.suffix.lower() == ".npz" and root.is_file():
        found = _of_arrays(root, flag_of(root), None, None, findings)
    else:
        found = _of_files(root, str(path), None, _several(root), findings)
    # Without a recipe nothing divides the cases but the data themselves.
    found.divided = any(case.part for case in found.cases)
    found.shown = str(path)
    return _examine(found, findings)


def examine_class_recipe(name: str, tree: Mapping[str, Any]) -> Report:
    """Examine the data of a recipe with `ImageFolder` or `MedMNIST`, divided as training would divide them.

    Raises:
        UserError: The recipe is no good, or its data are not there.
    """
    kind = "ImageFolder" if tree["data"]["class_path"] == DATA["ImageFolder"] else "MedMNIST"
    given = tree["data"]["init_args"]
    check_keys("data", given, KEYS[kind])
    values = {**KEYS[kind], **given}
    root, labels = values["root"], values["labels"]
    if not isinstance(root, str) or not root:
        raise UserError(f"data.root: is missing in the recipe {name}")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise UserError(f"data.labels: needs a list of names, got {labels!r:.80}")
    path = Path(root).expanduser()
    if root == PHANTOM:
        findings = Findings()
        rank = 3 if kind == "MedMNIST" and str(values["flag"] or "").endswith("3d") else 2
        found = _of_phantom(rank)
    elif kind == "MedMNIST":
        file = find_file(root, values["flag"], recipes.whole("native", values["native"], 1))
        findings = Findings(file.parent.absolute())
        found = _of_arrays(file, values["flag"] or flag_of(file), values["task"], labels, findings)
    else:
        findings = Findings((path if path.is_dir() else path.parent).absolute())
        found = _of_files(path, root, labels, bool(values["multi_label"]), findings)
    found.shown = root
    found.seed = recipes.whole("seed", values["seed"] if "seed" in given else tree.get("seed_everything", 0), 0)
    found.batch_size = recipes.whole("batch_size", values["batch_size"], 1)
    if values["split"] is not None:
        found.split = Split.from_config(values["split"])
        _group(found, findings)
    return _examine(found, findings)


def _of_files(path: Path, root: str, labels: Sequence[str] | None, multi: bool, findings: Findings) -> ClassSet:
    rows: list[Row]
    absolute = path.absolute()
    if path.is_file():
        rows, problems = list_table(absolute, multi)
        for problem in problems:
            findings.whole("table-line", problem.removeprefix(f"{absolute} "))
        rows = [row for row in rows if _there(row, findings)]
    else:
        rows = list_folders(absolute, root)
        _check_folders(absolute, findings)
    present = sorted({name for _, _, names, _, _ in rows for name in names})
    names = tuple(labels or present)
    for name in present:
        if name not in names:
            findings.whole("class-unknown", f"{name} ({sum(name in row[2] for row in rows)} images)")
    seen: dict[str, Path] = {}
    cases = []
    for name, file, classes, group, part in rows:
        if seen.setdefault(name, file) is not file:
            findings.file("duplicate-stem", file, f"and {seen[name].name}")
            continue
        known = tuple(sorted(names.index(one) for one in classes if one in names))
        if known or multi:
            cases.append(LabelledCase(name, group, known, root, file, part))
    return ClassSet(root, names, cases, grouped=any(case.group != case.name for case in cases))


def _of_arrays(path: Path, flag: str, task: str | None, labels: Sequence[str] | None, findings: Findings) -> ClassSet:
    if task is not None and task not in KINDS:
        raise unknown("task at data.task:", str(task), KINDS)
    images, truths = read_arrays(path)
    known = FLAGS.get(flag)
    several = task == MULTI_LABEL if task else bool(known and known[0] == MULTI_LABEL)
    if not task and not known:  # a file of another name: as its labels look
        several = all(truth.ndim == 2 and truth.shape[1] > 1 for truth in truths.values())
    names = tuple(labels or (known[1] if known else map(str, range(count_classes(truths, several)))))
    cases = []
    for part in PARTS:
        truth = truths[part]
        flat = truth.reshape(len(truth), -1)
        if flat.shape[1] != (len(names) if several else 1) or (several and ((flat < 0) | (flat > 1)).any()):
            findings.whole("class-numbers", f"{part}_labels {truth.shape}, {len(names)} classes")
            continue
        for index, row in enumerate(flat):
            name = f"{part}_{index:05d}"
            if several:
                classes = tuple(int(column) for column in row.nonzero()[0])
            elif 0 <= row[0] < len(names):
                classes = (int(row[0]),)
            else:
                findings.file("class-out-of-range", name, f"{int(row[0])}; there are {len(names)} classes, from 0 on")
                continue
            cases.append(LabelledCase(name, name, classes, str(path), None, part, index))
    return ClassSet(str(path), names, cases, images)


def _of_phantom(rank: int) -> ClassSet:
    images, truths = draw_phantom(rank, 32)
    cases = [
        LabelledCase(f"{part}_{index:05d}", f"{part}_{index:05d}", (int(kind),), PHANTOM, None, part, index)
        for part in PARTS
        for index, kind in enumerate(truths[part])
    ]
    return ClassSet(PHANTOM, PHANTOM_CLASSES, cases, images)


def _examine(found: ClassSet, findings: Findings) -> Report:
    """What is the same for all sources: files, copies, classes, division."""
    files = found.images is None
    cases = [_as_case(case) for case in found.cases]
    seen = look_at_files(cases) if found.images is None else look_at_arrays(cases, found.cases, found.images, findings)
    if files:
        for one in seen:
            check_file(one.image, findings)
            for path, text in one.complaints:
                findings.file("decoder-warning", path, text)
            if not one.image.error:
                check_image(one, findings)
        check_together([one.image for one in seen if not one.image.error], findings)
    _check_balance(found, findings)
    parts = _parts(found, findings)
    _check_parts(found, parts, findings)
    _check_classes_of_copies(seen, found, findings)
    groups = {case.name: case.group for case in found.cases} if found.grouped else {}
    ties = check_copies(seen, parts, groups, findings, videos=files)
    if files and not found.grouped:
        recipes.check_names(cases, parts, findings)
    return Report([printable(found.shown)], cases, None, False, findings.sorted(), ties, list(found.names))


def _as_case(case: LabelledCase) -> Case:
    """A case as copies, groups and the report know it; it has no mask."""
    image = case.image or Path(case.name)
    return Case(case.name, image, image, case.group, case.root)


def _several(table: Path) -> bool:
    """Whether a label of a table holds several classes."""
    if not table.is_file():
        return False
    return any("|" in label for _, _, labels, _, _ in list_table(table, False)[0] for label in labels)


def _there(row: Row, findings: Findings) -> bool:
    if row[1].exists():
        return True
    findings.file("missing-file", row[1])
    return False


def _check_folders(root: Path, findings: Findings) -> None:
    """Names in all folders, images that lie outside of a class, and classes without images."""
    homes = [root / part for part in PARTS if (root / part).is_dir()] if (root / "train").is_dir() else [root]
    for home in homes:
        for entry in sorted(home.iterdir()):
            if entry.is_file() and entry.suffix.lower() in SUFFIXES:
                findings.file("image-without-class", entry)
            if not entry.is_dir() or entry.name.startswith("."):
                continue
            images = 0
            for folder, files in walk_files(entry):
                check_names(folder, findings, below=True)
                images += sum(file.suffix.lower() in SUFFIXES for file in files)
            if not images:
                findings.whole("class-empty", findings.shown(entry))


def _group(found: ClassSet, findings: Findings) -> None:
    """Form the recipe's groups."""
    assert found.split is not None
    if found.split.group_by is None or found.images is not None:
        return
    try:
        groups = find_groups(found.cases, found.split.group_by)
    except UserError as error:
        findings.whole("group-by-failed", str(error).replace("\n", " "))
        return
    found.cases = [replace(case, group=group) for case, group in zip(found.cases, groups, strict=True)]
    found.grouped = True


def _check_balance(found: ClassSet, findings: Findings) -> None:
    counts = Counter(index for case in found.cases for index in case.classes)
    total = max(1, len(found.cases))
    for index, name in enumerate(found.names[: 4 * _SHOWN]):
        findings.whole("class-balance", f"{name} {counts[index]} of {total} cases ({counts[index] / total:.1%})")
    for index, name in enumerate(found.names):
        if not counts[index]:
            findings.whole("class-empty", name)
    there = [(count, found.names[index]) for index, count in counts.items()]
    if len(there) < 2:
        findings.whole("one-class", ", ".join(name for _, name in there) or "none")
    elif max(there)[0] > _UNEQUAL * min(there)[0]:
        findings.whole("class-imbalance", f"{max(there)[1]} {max(there)[0]}, {min(there)[1]} {min(there)[0]}")
    alike: dict[str, list[str]] = defaultdict(list)
    for name in found.names:
        alike["".join(name.casefold().split()).replace("-", "").replace("_", "")].append(name)
    for names in alike.values():
        if len(names) > 1:
            findings.whole("class-names-alike", ", ".join(f"'{name}'" for name in names))


def _parts(found: ClassSet, findings: Findings) -> dict[str, str]:
    """train, val or test of each case's name; empty where nothing divides them, or nothing can."""
    homes: dict[str, set[str]] = defaultdict(set)
    for case in found.cases:
        if case.part:
            homes[case.group].add(case.part)
    torn = sorted(group for group, where in homes.items() if len(where) > 1)
    if torn:
        findings.whole("group-across-parts", ", ".join(torn[:_SHOWN]) + (", ..." if len(torn) > _SHOWN else ""))
        return {case.name: case.part for case in found.cases if case.part}
    if not found.divided or not found.cases:
        return {}
    try:
        divided = divide(found.cases, found.split, found.seed, found.shown)
    except UserError as error:
        findings.whole("split-failed", str(error).replace("\n", " "))
        return {}
    told = ", ".join(f"{part} {len(divided[part])}" for part in PARTS)
    groups = len({case.group for case in found.cases})
    findings.whole("parts", told + (f"; {groups} groups" if found.grouped else ""))
    if len(divided["train"]) < found.batch_size:
        findings.whole("few-cases", f"{len(divided['train'])} training cases, batch_size {found.batch_size}")
    if len(divided["val"]) < _FEW_VALIDATION:
        findings.whole("few-validation-cases", f"{len(divided['val'])} validation cases")
    return {case.name: part for part in PARTS for case in divided[part]}


def _check_parts(found: ClassSet, parts: Mapping[str, str], findings: Findings) -> None:
    """Classes that one part has no case of."""
    held: dict[str, set[int]] = defaultdict(set)
    for case in found.cases:
        if case.name in parts:
            held[parts[case.name]].update(case.classes)
    for index, name in enumerate(found.names):
        where = {part for part, classes in held.items() if index in classes}
        missing = sorted(set(held) - where, key=PARTS.index)
        if where and "train" in missing:
            findings.whole("class-never-trained", f"{name}, of {' and '.join(sorted(where, key=PARTS.index))}")
        elif where and missing:
            findings.whole("class-missing-in-part", f"{name} in {' and '.join(missing)}")


def _check_classes_of_copies(seen: Sequence[Seen], found: ClassSet, findings: Findings) -> None:
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for index, one in enumerate(seen):
        if one.digest:
            by_digest[one.digest].append(index)
    for first, *others in by_digest.values():
        for other in others:
            if found.cases[other].classes != found.cases[first].classes:
                named = [
                    " and ".join(found.names[k] for k in found.cases[index].classes) or "none"
                    for index in (other, first)
                ]
                path = seen[first].case.image
                note = f"({named[0]}) = {findings.shown(path)} ({named[1]})"
                findings.file("same-image-different-classes", seen[other].case.image, note)
