"""Run folders: `ROOT/<recipe>/<time>/`, one for each training, found again by recipe name.

`run.json` in a run folder holds that name, which no path need tell (`--run DIR`), for whoever goes on from the folder's
own `config.yaml`.
"""

import json
import os
import time
from pathlib import Path

from visattn.errors import UserError
from visattn.files import write_text_atomic
from visattn.folds_file import has_folds, is_recipe_name, read_folds

ROOT = Path("runs")
RUN = "run.json"
LAST = Path("checkpoints/last.ckpt")
_RUN = "VISATTN_RUN"  # environment variable by which one process of a run tells the others its folder


def new_run(root: Path, recipe: str) -> Path:
    """Create a folder for a new run; two runs started in the same second get different ones."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1000):
        folder = root / recipe / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot be created: {error.strerror}; set trainer.default_root_dir") from None
        return folder
    raise UserError(f"{root / recipe}: no free name for a new run")


def named_run(folder: Path) -> Path:
    """Use `folder` for a new run; it must not hold one already. One that saved no checkpoint is begun again."""
    if has_folds(folder):
        raise UserError(f"--run {folder}: holds a run with folds. Continue it with --folds all --ckpt_path last")
    if (folder / LAST).exists():
        raise UserError(f"--run {folder}: holds a run already. Add --ckpt_path last to continue it, or name another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run {folder}: cannot be created: {error.strerror}") from None
    return folder


def is_first_process() -> bool:
    """Whether this process is the one that writes; the others of a distributed run only compute."""
    return all(os.environ.get(key, "0") == "0" for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))


def start_run(root: Path, recipe: str, run: Path | None) -> Path:
    """The folder of a new run, the same one in every process of a distributed run.

    Lightning starts its further processes with this one's environment, which then names the folder. Processes that
    torchrun or SLURM start at the same time share no environment, so there the user has to name it.

    Raises:
        UserError: several processes were started from outside and no folder was named, or it holds a run already.
    """
    if not is_first_process():
        if run is None and _RUN not in os.environ:
            raise UserError("several processes were started together: name their run folder with --run DIR")
        return run or Path(os.environ[_RUN])
    started_outside = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1
    if run is None and started_outside and ("TORCHELASTIC_RUN_ID" in os.environ or "SLURM_PROCID" in os.environ):
        raise UserError("several processes were started together: name their run folder with --run DIR")
    folder = named_run(run) if run is not None else new_run(root, recipe)
    os.environ[_RUN] = str(folder.resolve())
    return folder


def write_run(folder: Path, recipe: str) -> None:
    """Record in `folder` that it is a run of `recipe`."""
    write_text_atomic(folder / RUN, json.dumps({"recipe": recipe}) + "\n")


def recipe_of(folder: Path) -> str | None:
    """The name of the recipe that `folder` is a run of; None where nothing says so.

    Raises:
        UserError: `run.json` is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        return None
    try:
        name = json.loads(path.read_bytes())["recipe"]
        if not is_recipe_name(name):
            raise ValueError(f"{name!r:.60} is no name of a recipe")
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{path}: not written by visattn fit: {error}.\nRemove it, or name another folder.") from error
    return str(name)


def newest_run(root: Path, recipe: str) -> Path:
    """The newest run of `recipe` that saved a checkpoint.

    Raises:
        UserError: there is none.
    """
    runs = sorted(path.parent.parent for path in (root / recipe).glob(f"*/{LAST}"))
    if not runs:
        raise UserError(
            f"--ckpt_path: no run of '{recipe}' with a checkpoint under {root / recipe}.\n"
            "Start one without --ckpt_path, or name its folder with --run DIR."
        )
    return max(runs, key=lambda run: (run / LAST).stat().st_mtime)


def find_checkpoint(ckpt_path: str, root: Path, recipe: str, run: Path | None) -> tuple[Path, Path | None]:
    """The checkpoint that `--ckpt_path` means, and the run folder that it lies in (None when in no run).

    Args:
        ckpt_path: `last`, `best`, or a file.
        root: Folder of all runs.
        recipe: Name of the recipe, to find its newest run.
        run: The run folder, when `--run` names one.
    """
    if ckpt_path in {"last", "best"}:
        folder = run if run is not None else newest_run(root, recipe)
        if has_folds(folder):
            raise UserError(
                f"--run {folder}: a run with {read_folds(folder).count} folds, which has no checkpoint of its own.\n"
                "Continue its training: visattn fit --folds all --ckpt_path last. Score one fold: --run DIR/fold-0.\n"
                "The scores of all folds stand in its report.html. To score the ensemble on other cases:\n"
                "visattn predict --checkpoint DIR, then visattn evaluate."
            )
        path = folder / "checkpoints" / f"{ckpt_path}.ckpt"
        if not path.is_file():
            begun = (folder / "config.yaml").is_file() and not (folder / LAST).is_file()
            hint = "\nThe run ended before its first: leave --ckpt_path out to begin it again." if begun else ""
            raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint: {path}{hint}")
        return path, folder
    path = Path(ckpt_path)
    if not path.is_file():
        raise UserError(f"--ckpt_path {ckpt_path}: no such file; give last, best or the path of a .ckpt")
    inside = path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file()
    return path, path.parent.parent if inside else None
