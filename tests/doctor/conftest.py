import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from visattn.data.phantom import write_phantom
from visattn.doctor import Report, examine_folder, examine_recipe


def load_defects():
    """`defects.py` beside this file, which is no package."""
    if "doctor_defects" not in sys.modules:
        spec = importlib.util.spec_from_file_location("doctor_defects", Path(__file__).with_name("defects.py"))
        module = importlib.util.module_from_spec(spec)
        sys.modules["doctor_defects"] = module
        spec.loader.exec_module(module)
    return sys.modules["doctor_defects"]


def pytest_generate_tests(metafunc):
    if "planted" in metafunc.fixturenames:
        metafunc.parametrize("planted", load_defects().DEFECTS, ids=lambda defect: defect.name)


@pytest.fixture(scope="session")
def defects():
    return load_defects()


@pytest.fixture(scope="session")
def clean_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "set"
    write_phantom(folder, 16, seed=11, size=(64, 80))
    return folder


@pytest.fixture
def clean(clean_once, tmp_path) -> Path:
    """A clean set of 16 cases that may be spoiled."""
    return Path(shutil.copytree(clean_once, tmp_path / "set"))


@pytest.fixture
def examine() -> Callable[..., Report]:
    """Examine a folder by itself, or with a recipe and changes of its keys."""

    def run(folder: Path, recipe: tuple[str, ...] | None = None) -> Report:
        if recipe is None:
            return examine_folder(folder)
        changes = [str(folder / "splits.json") if word == "SPLITS" else word for word in recipe]
        usual = ["--data.size", "[64, 80]", "--data.batch_size", "4", "--data.split.val", "0.35"]
        return examine_recipe(["polyp_pranet"], ["--data.root", str(folder), *usual, *changes])

    return run
