"""Every dependency says how old it may be and why, and what is installed obeys.

`make minimum` runs this file as a script to get the floors as pip constraints, installs exactly those versions and runs
the fast tests on them.
"""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "pyproject.toml").read_text()


def requirements(text: str) -> list[Requirement]:
    """What a user may install: the dependencies and the extras but `dev` and `all`."""
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name in ("report", "natten", "dicom", "keras") for line in extras[name]]
    return [Requirement(line) for line in lines]


def floor(requirement: Requirement) -> str | None:
    versions = [specifier.version for specifier in requirement.specifier if specifier.operator in {">=", "=="}]
    return versions[0] if len(versions) == 1 else None


def without_reason(text: str) -> list[str]:
    """Names of the requirements whose line has no floor or no comment saying why."""
    bad = []
    for requirement in requirements(text):
        line = next(line for line in text.splitlines() if re.match(rf'\s*"{re.escape(requirement.name)}\b', line))
        _, _, comment = line.partition("#")
        if floor(requirement) is None or len(comment.split()) < 3:
            bad.append(requirement.name)
    return bad


def constraints(text: str) -> list[str]:
    """Every floor as a pip constraint."""
    return [f"{requirement.name}=={floor(requirement)}" for requirement in requirements(text)]


def test_every_dependency_has_a_floor_and_a_reason():
    assert len(requirements(TEXT)) >= 15
    assert without_reason(TEXT) == []


def test_a_missing_floor_or_reason_is_found():
    broken = TEXT.replace('"numpy>=2.0",', '"numpy",').replace("# before 13 a crafted JPEG", "# JPEG")
    broken = re.sub(r'("scipy>=[\d.]+",)\s*#.*', r"\1", broken)
    assert without_reason(broken) == ["numpy", "scipy"]


@pytest.mark.parametrize("requirement", requirements(TEXT), ids=lambda requirement: requirement.name)
def test_the_installed_version_is_allowed(requirement):
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        assert requirement.name == "natten", "only natten may be absent from a development environment"
        return
    assert requirement.specifier.contains(installed, prereleases=True), f"{installed} is installed"


def test_the_floors_are_exact_versions():
    assert f"torch=={floor(requirements(TEXT)[0])}" in constraints(TEXT)
    for line in constraints(TEXT):
        assert re.fullmatch(r"[\w-]+==\d+(\.\d+)+|[\w-]+==\d+", line), line


def test_all_is_everything_but_natten():
    extras = tomllib.loads(TEXT)["project"]["optional-dependencies"]
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.name == "visattn"
    assert everything.extras == set(extras) - {"all", "natten"}


if __name__ == "__main__":
    print("\n".join(constraints(TEXT)))
