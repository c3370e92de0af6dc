"""What is built is what is meant: one top-level package, with every module, recipe, template and marker in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Files inside visattn/ that are no source of the package.
BYPRODUCTS = {".pyc"}

pytestmark = pytest.mark.slow  # builds an archive and a wheel, and starts a second interpreter


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from the source archive that is built from this tree, so both are complete or this fails."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.glob("*.whl")
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_exactly_one_top_level_package(wheel):
    top = {name.split("/")[0] for name in names_in(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"visattn"}
    assert len(top) == 2


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "visattn").rglob("*")
        if path.is_file() and path.suffix not in BYPRODUCTS
    }
    assert {"visattn/py.typed", "visattn/data/images.py", "visattn/data/image_mask_folder.py"} <= sources
    assert sources - names_in(wheel) == set()


def test_every_recipe_is_in_the_wheel(wheel):
    recipes = {f"visattn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes
    assert {name for name in names_in(wheel) if name.endswith(".yaml")} == recipes


def test_licences_travel_with_it(wheel):
    ends = {name.rsplit("/", 1)[-1] for name in names_in(wheel) if ".dist-info/licenses/" in name}
    assert ends == {"LICENSE", "LICENSES.md"}


def test_the_installed_wheel_finds_its_recipes_far_from_the_source(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # a pure-Python wheel is installed by unpacking it
    code = "import visattn.recipe as r; print(r.__file__); print(r.find_recipe('polyp_pranet'))"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for line in result.stdout.split():
        assert Path(line).is_relative_to(site), line
