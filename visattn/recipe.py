"""Recipes: found by path or name, read safely, merged with the command line, and checked key by key.

A recipe is one complete YAML file in LightningCLI's layout. Nothing here imports torch, and nothing that a file names
is imported before it was found in a table: `class_path` is looked up in `TASKS`, `DATA` and `CALLBACKS` alone.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml

from visattn.data import DATA
from visattn.errors import UserError, did_you_mean, unknown
from visattn.files import read_small
from visattn.folds_file import CONFIG, has_folds, read_folds
from visattn.runs import recipe_of

TASKS = {
    "ClassificationTask": "visattn.classification.ClassificationTask",
    "SegmentationTask": "visattn.task.SegmentationTask",
}
CALLBACKS = {
    name: f"lightning.pytorch.callbacks.{name}"
    for name in (
        "DeviceStatsMonitor",
        "EarlyStopping",
        "GradientAccumulationScheduler",
        "LearningRateMonitor",
        "ModelSummary",
        "StochasticWeightAveraging",
        "Timer",
    )
}
TOP_LEVEL = ("seed_everything", "model", "data", "trainer")
SHORT = {"data.folds": "data.split.folds", "data.group_by": "data.split.group_by"}
"""Keys that may be written shorter on the command line."""
MAX_BYTES = 100_000  # a recipe is a page of text; anything larger is a mistake or an attack, and slow to parse
MAX_DEPTH = 20  # nesting; far beyond any recipe, far below Python's recursion limit
MAX_DIGITS = 40  # characters of a number; YAML's own notations (hexadecimal, 59:59:59...) can unfold to any size


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _refuse(loader: Any, problem: str) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, loader.peek_event().start_mark)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, aliases and tags, and reads `5e-4` as a number as YAML 1.2 does."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            _refuse(self, "aliases (*name) are not supported: write the value out")
        tag = getattr(cast(Any, self).peek_event(), "tag", None)
        if tag is not None:  # even YAML's own make objects, or fail inside PyYAML
            _refuse(self, f"tags ({tag}) are not supported: write the value alone")
        self.depth += 1
        if self.depth > MAX_DEPTH:
            _refuse(self, "nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:  # no path may hold it, and few say so kindly
            raise yaml.constructor.ConstructorError(None, None, "a text with a NUL character", node.start_mark)
        if node is not None and node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number this long is not supported", node.start_mark)
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_yaml(text: str, source: str) -> Any:
    """Parse `text`; a mistake becomes a `UserError` naming `source` and the line."""
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: {len(text)} characters are too many for a YAML value or recipe")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{source}{line}: not valid YAML: {problem}") from None


def packaged_recipes() -> dict[str, Path]:
    """Name to path of every recipe that visattn brings, in a wheel, an editable install or a source tree."""
    folders = [Path(str(resources.files("visattn"))) / "recipes", Path(__file__).resolve().parent.parent / "recipes"]
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else []:
            found.setdefault(path.stem, path)
    return found


def find_recipe(name: str) -> Path:
    """The recipe file that `name` means: a path first, then a packaged recipe by its name or file name.

    Raises:
        UserError: neither exists; the nearest packaged name is given.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = packaged_recipes()
    if (path.suffix in {"", ".yaml"}) and path.stem in packaged and path.parent.name in {"", "recipes"}:
        return packaged[path.stem]
    if path.is_dir():
        raise UserError(f"--config {name}: is a folder; name a YAML file in it")
    hint = did_you_mean(path.stem, packaged)
    raise UserError(f"--config {name}: no such file and no such packaged recipe.{hint}\nSee: visattn recipes")


def load_recipe(path: Path) -> dict[str, Any]:
    """The tree in the recipe file `path`, not yet checked."""
    try:
        text = read_small(path, MAX_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read as text: {reason}") from None
    tree = read_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(TOP_LEVEL)}")
    return tree


def parse_overrides(arguments: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`--data.root DIR` or `--data.root=DIR` to `[(["data", "root"], "DIR")]`; values are YAML."""
    overrides = []
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise UserError(f"unexpected argument '{token}': keys of the recipe are given as --section.key VALUE")
        name, equals, value = token[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                raise UserError(f"--{name}: needs a value")
            value = rest.pop(0)
        overrides.append((SHORT.get(name, name).split("."), _override_value(name, value)))
    return overrides


def _override_value(name: str, value: str) -> Any:
    # Text such as a path with a colon or a regular expression is not YAML that a user meant as such.
    if value[:1] in "[{":
        return read_yaml(value, f"--{name}")
    try:
        parsed = read_yaml(value, f"--{name}")
    except UserError:
        return value
    return value if isinstance(parsed, dict | list) or (parsed is None and value not in {"null", "~"}) else parsed


def merge(base: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """`other` laid over `base`: sections are merged, the value of each key is replaced whole."""
    merged = dict(base)
    for section, value in other.items():
        old = merged.get(section)
        if isinstance(old, dict) and isinstance(value, Mapping):
            new = {**old, **value}
            if isinstance(old.get("init_args"), dict) and isinstance(value.get("init_args"), Mapping):
                same = value.get("class_path", old.get("class_path")) == old.get("class_path")
                new["init_args"] = {**(old["init_args"] if same else {}), **value["init_args"]}
            merged[section] = new
        else:
            merged[section] = value
    return merged


def apply_override(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Set one key of `tree` in place; below `model` and `data` the word `init_args` may be left out."""
    keys = list(keys)
    if keys[0] not in TOP_LEVEL:
        raise unknown("key", keys[0], [*TOP_LEVEL, "config", "ckpt_path", "run", "print_config"])
    if keys[0] in {"model", "data"}:
        if len(keys) == 1:
            keys.append("class_path")
        elif keys[1] not in {"class_path", "init_args"}:
            keys.insert(1, "init_args")
    node = tree
    for depth, key in enumerate(keys[:-1]):
        below = node.get(key)
        if below is None:
            below = node[key] = {}
        elif not isinstance(below, dict):
            raise UserError(f"--{'.'.join(keys)}: '{'.'.join(keys[: depth + 1])}' holds a value, it has no keys below")
        node[key] = node = dict(below)
    node[keys[-1]] = value


def check(tree: Mapping[str, Any]) -> None:
    """Refuse unknown sections and classes before anything is imported.

    Raises:
        UserError: names the key and the nearest valid one.
    """
    for key in tree:
        if key not in TOP_LEVEL:
            raise unknown("key", str(key), TOP_LEVEL)
    for section, table in (("model", TASKS), ("data", DATA)):
        value = tree.get(section)
        for key in value if isinstance(value, Mapping) else ():
            if key not in {"class_path", "init_args"}:
                raise unknown("key", f"{section}.{key}", [f"{section}.class_path", f"{section}.init_args"])
        if not isinstance(value, Mapping) or "class_path" not in value:
            raise UserError(f"{section}: needs class_path and init_args. Known classes: {', '.join(sorted(table))}")
        class_name(section, value["class_path"], table)
        if not isinstance(value.get("init_args") or {}, Mapping):
            raise UserError(f"{section}.init_args: must be a mapping of keys to values")
        _refuse_classes(value.get("init_args") or {}, f"{section}.init_args")
    trainer = tree.get("trainer") or {}
    if not isinstance(trainer, Mapping):
        raise UserError("trainer: must be a mapping of keys to values")
    callbacks = trainer.get("callbacks") or []
    for index, item in enumerate(callbacks if isinstance(callbacks, list) else [callbacks]):
        where = f"trainer.callbacks[{index}]"
        path = item.get("class_path") if isinstance(item, Mapping) else item
        class_name(where, path, CALLBACKS)
        if isinstance(item, Mapping):
            _refuse_classes(item.get("init_args") or {}, f"{where}.init_args")
    _refuse_classes({key: value for key, value in trainer.items() if key != "callbacks"}, "trainer")


def class_name(where: str, path: Any, table: Mapping[str, str]) -> str:
    """The short name in `table` that `path` (short or full) means."""
    if not isinstance(path, str):
        raise UserError(f"{where}.class_path: must be a name, one of {', '.join(sorted(table))}")
    for name, full in table.items():
        if path in {name, full}:
            return name
    raise unknown(f"class at {where}.class_path:", path.rsplit(".", 1)[-1] if path.count(".") else path, table)


def check_keys(where: str, given: Iterable[Any], valid: Iterable[str]) -> None:
    """Every key in `given` must be one of `valid`."""
    valid = list(valid)
    for key in given:
        if key not in valid:
            raise unknown(f"key in {where}:", str(key), valid)


def _refuse_classes(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise UserError(f"{where}.class_path: a recipe may name classes only at model, data and trainer.callbacks")
        for key, below in value.items():
            _refuse_classes(below, f"{where}.{key}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            _refuse_classes(below, f"{where}[{index}]")


def resolve(configs: Sequence[str], arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The name of the last recipe in `configs` and the merged, checked tree with full class paths.

    Args:
        configs: Paths or packaged names; later ones lie over earlier ones.
        arguments: Command-line overrides, `--section.key VALUE`.
    """
    tree: dict[str, Any] = {}
    name = ""
    for config in configs:
        path = find_recipe(config)
        tree = merge(tree, load_recipe(path))
        name = _recipe_name(path)
    for keys, value in parse_overrides(arguments):
        apply_override(tree, keys, value)
    check(tree)
    for section, table in (("model", TASKS), ("data", DATA)):
        short = class_name(section, tree[section]["class_path"], table)
        tree[section] = {"class_path": table[short], "init_args": dict(tree[section].get("init_args") or {})}
    return name, tree


def _recipe_name(path: Path) -> str:
    """The recipe's name: that of its file, or, for the `config.yaml` of a run, of the recipe that it was."""
    if path.name != CONFIG:
        return path.stem
    for folder in (path.parent, path.parent.parent):
        if has_folds(folder):
            return read_folds(folder).recipe
    return recipe_of(path.parent) or path.stem


def describe_recipes() -> list[dict[str, Any]]:
    """One row for each packaged recipe: name, task, network, data, size, epochs, and its first line."""
    rows = []
    for name, path in sorted(packaged_recipes().items()):
        tree = load_recipe(path)
        model, data = (tree[section].get("init_args", {}) for section in ("model", "data"))
        network = model.get("network", {})
        rows.append(
            {
                "name": name,
                "task": tree["model"]["class_path"].removesuffix("Task").lower(),
                "network": " + ".join(str(network[key]) for key in ("name", "backbone") if key in network),
                "data": str(data.get("root", "")),
                "input": str(data.get("patch") or data.get("size") or ""),
                "epochs": tree.get("trainer", {}).get("max_epochs", ""),
                "about": path.read_text(encoding="utf-8").splitlines()[0].lstrip("# "),
            }
        )
    return rows
