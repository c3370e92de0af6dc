"""Habits of the repository that a reader relies on and a machine can check."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
MAX_LINES = 400
MAX_BYTES = 1_500_000

# Folders that exist on some machine only. Spelled so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|farm|root|home/\w+|Users/\w+|tmp/bash_jobs)/")
REGISTRY = re.compile(r"pythonhosted\.org|(?:extra-)?index-url|find-links|registry\.npmjs|pypi\.org/simple")
# What a recipe's leading comment must say, one line each.
HEADER = {
    "Command": r"visattn fit --config recipes/{name}\.yaml\b",
    "Hardware": r"\w+",
    "Hours": r"\w+",
    "Expected": r"\w+",
    "Source": r"\w+",
}


def tracked() -> list[Path]:
    """Every file under version control."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """The file's text, empty for a binary one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def found(pattern: re.Pattern[str]) -> list[str]:
    """Where `pattern` occurs in tracked text, this file left out."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path != Path(__file__).resolve()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]


def header_of(text: str) -> str:
    """The comment lines a recipe begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return "\n".join(lines)


def missing_from_header(text: str, name: str) -> list[str]:
    header = header_of(text)
    return [
        label
        for label, pattern in HEADER.items()
        if not re.search(rf"(?m)^# {label}:\s*{pattern.format(name=re.escape(name))}", header)
    ]


def test_no_path_of_one_machine():
    assert found(MACHINE_PATH) == []


def test_no_package_registry():
    assert found(REGISTRY) == []


@pytest.mark.parametrize(
    ("pattern", "line", "hit"),
    [
        (MACHINE_PATH, "root: /" + "work/shared/data", True),
        (MACHINE_PATH, "open('/" + "home/ada/x.png')", True),
        (MACHINE_PATH, "see docs/" + "work/notes.md", False),
        (MACHINE_PATH, "https://example.org/" + "root", False),
        (REGISTRY, "pip install --index-url " + "x", True),
        (REGISTRY, "pip install visattn", False),
    ],
)
def test_the_patterns_find_what_they_should(pattern, line, hit):
    assert bool(pattern.search(line)) == hit


def test_no_file_of_the_package_is_long():
    lengths = {path.relative_to(ROOT): len(text_of(path).splitlines()) for path in (ROOT / "visattn").rglob("*.py")}
    assert len(lengths) > 10
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_no_large_file():
    assert [str(path.relative_to(ROOT)) for path in tracked() if path.stat().st_size > MAX_BYTES] == []


def test_annotations_stay_objects():
    """Shapes and choices are read from the annotations at run time, so they are never postponed to strings."""
    assert found(re.compile("^from __future__ import " + "annotations")) == []


def test_nothing_is_left_to_do():
    assert found(re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_command_hardware_hours_score_and_source(recipe):
    assert missing_from_header(recipe.read_text(), recipe.stem) == []


def test_a_recipe_header_that_lacks_something_is_found():
    complete = (
        "# PraNet\n#\n# Command:  visattn fit --config recipes/x.yaml --data.root DIR\n# Hardware: one GPU\n"
        "# Hours:    0.1\n# Expected: Dice 0.9\n# Source:   a paper\nmodel: 1\n"
    )
    assert missing_from_header(complete, "x") == []
    assert missing_from_header(complete, "y") == ["Command"]
    assert missing_from_header(complete.replace("Dice 0.9", ""), "x") == ["Expected"]
    assert missing_from_header("model: 1\n" + complete, "x") == list(HEADER)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_complete_in_one_file(recipe):
    assert {"seed_everything", "model", "data", "trainer"} <= set(yaml.safe_load(recipe.read_text()))


def test_there_are_recipes():
    assert RECIPES
