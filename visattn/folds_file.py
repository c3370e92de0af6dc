"""`folds.json`: makes a folder a run with folds, and names the folds' own run folders in it.

    {"format": 1, "folds": 5, "recipe": "polyp_pranet", "fingerprint": "...", "runs": ["fold-0", ..., "fold-4"]}

The folder also holds `splits.json`, the cases of each fold as a list in nnU-Net's form, and `config.yaml`, the recipe
that all folds are trained with. It may come from anybody, so the names of the folds are not taken from it but checked.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visattn.errors import UserError
from visattn.files import read_small, write_text_atomic

FORMAT = 1
FOLDS, SPLITS, CONFIG = "folds.json", "splits.json", "config.yaml"
BEST, LAST = Path("checkpoints/best.ckpt"), Path("checkpoints/last.ckpt")
MOST = 1000  # folds; more is a mistake


@dataclass(frozen=True)
class Folds:
    """A run with folds.

    Args:
        folder: The folder that holds `folds.json`.
        count: How many folds the data was divided into.
        recipe: Name of the recipe.
        fingerprint: Of the data that was divided.
    """

    folder: Path
    count: int
    recipe: str
    fingerprint: str

    @property
    def names(self) -> list[str]:
        """The folds' folders, as they are called in `folder`."""
        return [f"fold-{number}" for number in range(self.count)]

    def run(self, number: int) -> Path:
        """The run folder of a fold."""
        return self.folder / self.names[number]

    def checkpoints(self) -> list[Path]:
        """The best checkpoint of every fold.

        Raises:
            UserError: A fold has none.
        """
        found = [self.run(number) / BEST for number in range(self.count)]
        missing = [path.parent.parent.name for path in found if not path.is_file()]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {self.count} folds have no {BEST} yet: {shorten(missing)}.\n"
                f"Train them: visattn fit --config {self.folder / CONFIG} --folds all --ckpt_path last "
                f"--run {self.folder}\nOr give the run folder of one fold that has it."
            )
        return found


def has_folds(folder: Path) -> bool:
    """Whether `folder` is a run with folds."""
    return (folder / FOLDS).is_file()


def read_folds(folder: Path) -> Folds:
    """Read `folds.json` of a run with folds.

    Raises:
        UserError: It is missing, damaged or of another format.
    """
    path = folder / FOLDS
    try:
        content = json.loads(read_small(path, 1_000_000))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from error
    content = content if isinstance(content, dict) else {}
    if type(content.get("format")) is int and content["format"] > FORMAT:
        raise UserError(f"{path}: written by a newer visattn.\nUpgrade: pip install --upgrade visattn")
    count, name, fingerprint = (content.get(key) for key in ("folds", "recipe", "fingerprint"))
    texts = isinstance(name, str) and isinstance(fingerprint, str)
    if content.get("format") != FORMAT or not texts or not isinstance(count, int) or not 2 <= count <= MOST:
        raise UserError(f"{path}: not written by visattn fit --folds.\nName a run folder that was.")
    name, fingerprint = str(name), str(fingerprint)
    if not is_recipe_name(name):
        raise UserError(f"{path}: '{name:.60}' is no name of a recipe.\nName a run folder of visattn fit --folds.")
    folds = Folds(folder, count, name, fingerprint)
    if content.get("runs") != folds.names:
        raise UserError(f"{path}: names other runs than fold-0 to fold-{count - 1}.\nName a run folder of fit --folds.")
    return folds


def write_folds(folds: Folds, splits: Sequence[Mapping[str, Sequence[str]]]) -> None:
    """Write `splits.json`, then `folds.json`, which makes the folder a run with folds."""
    write_text_atomic(folds.folder / SPLITS, json.dumps(splits, indent=1) + "\n")
    content = {
        "format": FORMAT,
        "folds": folds.count,
        "recipe": folds.recipe,
        "fingerprint": folds.fingerprint,
        "runs": folds.names,
    }
    write_text_atomic(folds.folder / FOLDS, json.dumps(content, indent=1) + "\n")


def is_recipe_name(name: object) -> bool:
    """Whether `name`, which comes from a file, may become a part of paths."""
    return isinstance(name, str) and Path(name).name == name and name not in {"", ".."} and "\0" not in name


def shorten(names: Sequence[str], most: int = 8) -> str:
    """`names` in words, the first `most` of them."""
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")
