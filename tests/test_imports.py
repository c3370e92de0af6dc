"""Imports point one way: what is below never learns about what is above it.

The table is the architecture. A new file must be entered at its level, otherwise a test here fails and says so.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "visattn"

# From the bottom up. A file or package imports only levels below its own, and its own inside.
LEVELS: list[set[str]] = [
    {"_timm", "errors", "versions"},
    {"archives", "cells", "class_labels", "files", "labels", "memory", "signals"},
    {"components", "distrust", "folds_file", "keras_file", "scratch"},
    {
        "attention",
        "data",
        "failures",
        "inference",
        "losses",
        "metrics",
        "optimizers",
        "overlay",
        "progress",
        "runs",
        "space",
    },
    {"blocks", "mask_files", "overlay3d", "postprocessing", "shadow"},
    {
        "backbones",
        "class_scored",
        "curves",
        "heads",
        "inference3d",
        "predict_plan",
        "recipe",
        "scored",
        "survey",
        "viz",
    },
    {"evaluate_output", "gna", "hub", "inflation", "predict_record", "report", "weights"},
    {"evaluate_plan", "networks"},
    {"checkpoint", "convert", "evaluate_show", "summary"},
    {"callbacks", "checkpoint_io", "members", "predict_common", "survival", "volume_inference"},
    {"predict_classes_plan", "predict_volumes_measure", "predict_volumes_plan", "scoring", "slice_network"},
    {"class_predictor", "volume_predictor"},
    {"base_task", "predict_volumes_report", "predict_volumes_run"},
    {"classification", "predict_classes", "predict_volumes", "predictor", "task"},
    {"predict"},
    {"recipe_cli", "results"},
    {"class_pool", "class_results"},
    {"evaluate", "evaluate_classes", "fit", "folds_pool"},
    {"compare", "doctor", "folds"},
    {"init"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}

# Third-party packages that only some files may name: the rest of the code stays independent of them.
DOORS = {
    "albumentations": {"data/augment.py"},
    "lightning": {
        *("base_task.py", "callbacks.py", "checkpoint_io.py", "data/*", "fit.py", "recipe_cli.py", "survival.py"),
    },
    "jsonargparse": {"recipe_cli.py", "cli.py"},
    "timm": {
        "backbones/*",
        "classification.py",
        "data/class_augment.py",
        "hub.py",
        "networks/*",
        "optimizers.py",
        "weights.py",
    },
    "nibabel": {"data/_nifti_header.py"},
    "pydicom": {"data/dicom.py"},
    "h5py": {"keras_file.py"},
    "natten": {"attention/_backend.py"},
    "flash_attn": {"attention/_backend.py"},
    "xformers": {"attention/_backend.py"},
    "matplotlib": {"curves.py", "viz.py", "compare/*"},
    "jinja2": {"report/*"},
}
# Blocks are tensor in, tensor out: nothing but torch and the standard library.
TORCH_ONLY = {"attention"}


def imports(source: str, package: str = "visattn") -> list[tuple[int, str]]:
    """(line, dotted name) of everything that `source` imports, wherever in it the import stands."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from visattn import task` names a file of ours, `from torch import nn` a member of torch.
            found += [
                (node.lineno, f"{module}.{alias.name}" if module == "visattn" else module) for alias in node.names
            ]
    return sorted(set(found))


def unit(path: Path) -> str:
    """The file or package directly below visattn/ that `path` belongs to."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def package_of(path: Path) -> str:
    return ".".join(("visattn", *path.relative_to(ROOT).parts[:-1]))


def wrong_direction(source: str, own: str, package: str = "visattn") -> list[str]:
    """Imports in a file of `own` that point upwards or sideways."""
    bad = []
    for line, name in imports(source, package):
        parts = name.split(".")
        if parts[0] != "visattn" or len(parts) == 1 or parts[1] == own:
            continue
        other = parts[1]
        if other not in LEVEL:
            if other.isupper() or other.startswith("__"):
                continue  # a constant of visattn/__init__.py, as NOTICE
            bad.append(f"line {line}: visattn.{other} is at no level of tests/test_imports.py")
        elif LEVEL[other] >= LEVEL[own]:
            bad.append(f"line {line}: {own} imports {other}")
    return bad


def through_a_closed_door(source: str, path: str) -> list[str]:
    """Imports of third-party packages that the file at `path` (below visattn/) may not name."""
    bad = []
    for line, name in imports(source):
        top = name.split(".")[0]
        if top in DOORS and not any(Path(path).match(allowed) for allowed in DOORS[top]):
            bad.append(f"line {line}: {path} imports {top}")
        own = path.split("/")[0]
        allowed = top in {"torch", *DOORS, *sys.stdlib_module_names} or name.startswith(f"visattn.{own}")
        if own in TORCH_ONLY and not allowed:
            bad.append(f"line {line}: {path} imports {name}")
    return bad


# visattn/__init__.py re-exports from every level, lazily.
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_downwards(path):
    assert unit(path) in LEVEL, f"enter visattn/{unit(path)} at its level in {Path(__file__).name}"
    assert wrong_direction(path.read_text(), unit(path), package_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_third_party_packages_are_named_where_they_belong(path):
    assert through_a_closed_door(path.read_text(), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    ("source", "own", "bad"),
    [
        ("from visattn.networks import create_model", "heads", True),
        ("from visattn import task", "networks", True),
        ("def f():\n    import visattn.cli", "task", True),
        ("from visattn.heads.pranet import PraNetHead", "attention", True),
        ("from visattn.metrics import dice", "data", True),
        ("from visattn.surprise import x", "cli", True),
        ("from visattn.attention import FUSION", "heads", False),
        ("from visattn.errors import UserError", "data", False),
        ("from visattn.data.images import read_image", "data", False),
        ("from visattn import NOTICE", "report", False),
        ("import torch", "attention", False),
    ],
)
def test_an_arrow_in_the_wrong_direction_is_found(source, own, bad):
    assert bool(wrong_direction(source, own)) == bad


def test_a_relative_import_is_resolved():
    assert imports("from ..networks import pranet", "visattn.heads") == [(1, "visattn.networks")]
    assert imports("from . import pranet", "visattn.heads") == [(1, "visattn.heads")]
    assert wrong_direction("from ..networks import pranet", "heads", "visattn.heads")


@pytest.mark.parametrize(
    ("source", "path", "bad"),
    [
        ("import albumentations as A", "data/image_mask_folder.py", True),
        ("import albumentations as A", "data/augment.py", False),
        ("from timm import create_model", "heads/pranet.py", True),
        ("from timm import create_model", "networks/pranet.py", False),
        ("import numpy as np", "attention/reverse.py", True),
        ("import timm", "attention/reverse.py", True),
        ("import natten", "attention/reverse.py", True),
        ("import natten", "attention/_backend.py", False),
        ("from visattn.errors import UserError", "attention/reverse.py", True),
        ("import math\nfrom torch import nn", "attention/reverse.py", False),
    ],
)
def test_a_closed_door_is_noticed(source, path, bad):
    assert bool(through_a_closed_door(source, path)) == bad


def test_importing_the_package_loads_no_torch():
    """`visattn --help` and a mistake in a recipe answer at once; the last lines show that the check can fail."""
    code = "import sys; import {}; print(sorted({{'torch', 'lightning', 'timm', 'numpy'}} & set(sys.modules)))"
    for module in ("visattn", "visattn.cli", "visattn.recipe"):
        result = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True)
        assert result.stdout.strip() == "[]", module
    result = subprocess.run(
        [sys.executable, "-c", code.format("visattn.errors, numpy")], capture_output=True, text=True, check=True
    )
    assert "numpy" in result.stdout
