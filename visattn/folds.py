"""`visattn fit --folds all`: cross-validation, one ordinary run for each fold.

This process divides the data, writes down how, and starts one child after the other, `visattn fit` with its fold:
memory and devices are free again after each, and a fold can be continued or repeated alone. The children read the
recipe from `config.yaml` of the folder, not from the user's file, which may be edited while they train. When all folds
are done their cases are pooled (`visattn.folds_pool`).
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from visattn.data.splits import part_names
from visattn.errors import UserError
from visattn.files import write_text_atomic
from visattn.fit import quiet
from visattn.folds_file import (
    BEST,
    CONFIG,
    FOLDS,
    LAST,
    MOST,
    SPLITS,
    Folds,
    has_folds,
    read_folds,
    shorten,
    write_folds,
)
from visattn.folds_pool import tell_folds, write_pooled
from visattn.recipe_cli import RecipeCLI, parse
from visattn.runs import ROOT, named_run, new_run
from visattn.scored import CASES, INPUTS, SUMMARY
from visattn.signals import STOPPING, Stopped

DEFAULT = 5  # folds, where the recipe names no number
LOCK = ".visattn.lock"
# What may differ between the start of a run with folds and its continuation: it changes no result, or no more than
# another machine does.
_FREE = ("data.num_workers", "data.cache", "data.cache_dir", "trainer.accelerator", "trainer.devices",
         "trainer.default_root_dir", "trainer.enable_progress_bar")  # fmt: skip


def fit_folds(
    folds: str,
    name: str,
    tree: dict[str, Any],
    ckpt_path: str | None = None,
    run: str | None = None,
    print_config: bool = False,
) -> int:
    """Train the folds of a cross-validation; when all are done, write their pooled scores.

    Args:
        folds: `all`, or numbers from 0 with commas between them.
        name: Name of the recipe.
        tree: The recipe, as `visattn.recipe.resolve` returns it.
        ckpt_path: `last` continues: finished folds are kept, interrupted ones go on, missing ones start.
        run: The folder, instead of a new one, or (with `ckpt_path`) the newest one.
        print_config: Print the complete recipe and stop.

    Returns:
        The exit code: 0, or that of the fold that failed or was stopped, which ends the command.

    Raises:
        UserError: The recipe or the data is no good, or the folder's folds are not those of this recipe and data.
    """
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
        raise UserError("--folds starts the processes of each fold itself: start it once, and set trainer.devices")
    count = _count(tree)
    chosen = _chosen(folds, count)
    with quiet():
        cli = parse(tree)
        if print_config:
            print(yaml.safe_dump(cli.resolved, sort_keys=False), end="")
            return 0
    root = Path(cli.config.trainer.default_root_dir or ROOT)
    before = _to_continue(ckpt_path, root, name, Path(run) if run else None)
    with quiet():
        data = _check(cli)
    splits = [part_names(parts) for parts in data.find_folds()]
    if before is None:
        folder = named_run(Path(run)) if run else new_run(root, name)
        state = Folds(folder, count, name, data.fingerprint)
    else:
        state = before
        _compare(state, count, data.fingerprint, splits, cli.resolved)
    del data
    with _only_one(state.folder) as lock:
        write_text_atomic(state.folder / CONFIG, yaml.safe_dump(cli.resolved, sort_keys=False))
        if before is None:
            write_folds(state, splits)
        print(f"run: {state.folder} ({count} folds)", file=sys.stderr)
        code = _train(state, chosen, splits, lock)
        if code and before is None:
            _clear(state)
        missing = [state.names[number] for number in range(count) if not finished(state.run(number))]
        if code == 0 and not missing:
            report = write_pooled(state, splits)
            print(tell_folds(state), file=sys.stderr)
            print(f"pooled scores: {state.folder}" + (f"\nreport: {report}" if report else ""), file=sys.stderr)
        elif code == 0:
            print(f"pooled scores and ensemble wait for {shorten(missing)}.\n{_continue(state)}", file=sys.stderr)
    return code


def finished(run: Path) -> bool:
    """Whether a fold was trained and scored to the end."""
    return all((run / name).is_file() for name in (BEST, CASES, SUMMARY, INPUTS))


def _count(tree: Mapping[str, Any]) -> int:
    """The number of folds; the recipe's split block then names it, and fold 0."""
    arguments = tree["data"]["init_args"]
    split = arguments.get("split") or {}
    if not isinstance(split, Mapping):
        raise UserError("data.split: must be a mapping of keys to values")
    if split.get("files") is not None:
        raise UserError(
            f"--folds: data.split.files names {split['files']}, so there is nothing to divide into folds.\n"
            "Add --data.split.files null to divide the data anew, or train one fold of that file with fit and "
            "--data.split.fold N."
        )
    count = split.get("folds")
    count = DEFAULT if count is None else count
    if isinstance(count, int) and count > MOST:
        raise UserError(f"data.split.folds: at most {MOST}, got {count}")
    arguments["split"] = {**split, "folds": count, "fold": 0}
    return count if isinstance(count, int) else 0  # what is no number is refused with the rest of the block


def _chosen(text: str, count: int) -> list[int]:
    """The folds that `--folds` names."""
    if text == "all" or count < 2:
        return list(range(count))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) < 7 for part in parts):
        raise UserError(f"--folds {text}: give all, or numbers of folds with commas between them, as 0,2")
    numbers = sorted({int(part) for part in parts})
    if numbers[-1] >= count:
        raise UserError(
            f"--folds {text}: there are {count} folds, 0 to {count - 1}.\n--data.folds N divides the data into N folds."
        )
    return numbers


def _to_continue(ckpt_path: str | None, root: Path, name: str, run: Path | None) -> Folds | None:
    """The run with folds that is to be continued, None for a new one."""
    if ckpt_path is None:
        return None
    if ckpt_path != "last":
        raise UserError(f"--ckpt_path {ckpt_path}: with --folds only last, which continues every fold where it stopped")
    if run is not None:
        if not has_folds(run):
            raise UserError(
                f"--run {run}: holds no run with folds.\nStart one without --ckpt_path, or name the folder that holds "
                f"{FOLDS}."
            )
        return read_folds(run)
    found = list((root / name).glob(f"*/{FOLDS}"))
    if not found:
        raise UserError(
            f"--ckpt_path: no run of '{name}' with folds under {root / name}.\n"
            "Start one without --ckpt_path, or name its folder with --run DIR."
        )
    return read_folds(max(found, key=lambda path: path.stat().st_mtime).parent)


def _check(cli: RecipeCLI) -> Any:
    """The data module; what is wrong with network or loss is found here, before a folder is made."""
    task, data = cli.build()
    task.data, task.init_from = data, None
    task.config["network"]["pretrained"] = False
    task.configure_model()
    return data


def _compare(
    state: Folds, count: int, fingerprint: str, splits: Sequence[Mapping[str, Any]], recipe: dict[str, Any]
) -> None:
    """Refuse to continue with other folds, data or settings: the pooled scores would mix what cannot be mixed."""
    end = f"Give the keys that the run was started with ({state.folder / CONFIG}), or start a new run without --run."
    if count != state.count:
        raise UserError(f"--run {state.folder}: was divided into {state.count} folds, not {count}.\n{end}")
    if fingerprint != state.fingerprint:
        raise UserError(
            f"--run {state.folder}: the data changed since the folds were made (files added, removed or edited).\n"
            "Restore it, or start a new run without --run."
        )
    try:
        saved = json.loads((state.folder / SPLITS).read_bytes())
        old = yaml.safe_load((state.folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--run {state.folder}: {SPLITS} or {CONFIG} cannot be read: {error}.") from error
    was, now = _flat(old), _flat(recipe)
    differing = [key for key in sorted({*was, *now}) if was.get(key) != now.get(key) and key not in _FREE]
    if differing:
        shown = "; ".join(f"{key}: {was.get(key)!s:.60} there, {now.get(key)!s:.60} here" for key in differing[:2])
        more = f" (and {len(differing) - 2} more)" if len(differing) > 2 else ""
        raise UserError(f"--run {state.folder}: was started with another recipe.\n{shown}{more}\n{end}")
    if saved != splits:
        raise UserError(f"--run {state.folder}: {SPLITS} does not hold the folds of this data and seed.\n{end}")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A tree as dotted keys, `init_args` left out as on the command line."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, below in value.items():
        found |= _flat(below, prefix if key == "init_args" else f"{prefix}.{key}" if prefix else str(key))
    return found


@contextmanager
def _only_one(folder: Path) -> Iterator[int]:
    """Keep a second command out of `folder`, also while a child outlives this one, which inherits the lock.

    Yields:
        The descriptor that holds the lock.
    """
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--run {folder}: another visattn fit is training there.\nWait for it, or stop it, then continue."
            ) from None
        yield handle
    finally:
        os.close(handle)


def _train(state: Folds, chosen: Sequence[int], splits: Sequence[Mapping[str, Any]], lock: int) -> int:
    """Train the chosen folds that are not finished, one after the other; the first code that is not 0 ends it."""
    with _Children() as children:
        for number in chosen:
            run = state.run(number)
            if finished(run):
                print(f"{run.name}: finished before, kept", file=sys.stderr)
                continue
            resumed = (run / LAST).is_file()
            print(f"{run.name}: {'continues' if resumed else 'starts'}, of {state.count} folds", file=sys.stderr)
            code = children.run(command(state, number, resumed), lock)
            if finished(run):
                _check_split(run, splits[number])
            elif code == 0 and children.stopped is None:
                raise UserError(f"{run}: trained, but its scores are not complete.\n{_continue(state)}")
            if code or children.stopped is not None:
                what = "stopped" if code in (130, 143) or children.stopped else f"failed (exit code {code})"
                print(f"visattn: {run.name} {what}. {_continue(state)}", file=sys.stderr)
                return code or (children.stopped.exit_code if children.stopped else 0)
    return 0


def command(state: Folds, number: int, resumed: bool) -> list[str]:
    """The command line that trains one fold."""
    words = [sys.executable, "-m", "visattn", "fit", "--config", str(state.folder / CONFIG)]
    words += ["--data.split.fold", str(number), "--run", str(state.run(number))]
    return words + (["--ckpt_path", "last"] if resumed else [])


def _check_split(run: Path, split: Mapping[str, Any]) -> None:
    """The child divided the data again; it must have come to the same folds."""
    if json.loads((run / SPLITS).read_bytes()) != split:
        raise UserError(
            f"{run}: was trained on other cases: the data changed while the folds were training.\nStart anew."
        )


def _continue(state: Folds) -> str:
    config, run = shlex.quote(str(state.folder / CONFIG)), shlex.quote(str(state.folder))
    return f"Continue with:\nvisattn fit --config {config} --folds all --ckpt_path last --run {run}"


def _clear(state: Folds) -> None:
    """Remove what a new run wrote, if not even its first fold came to anything."""
    if not any(state.run(number).exists() for number in range(state.count)):
        for name in (FOLDS, SPLITS, CONFIG, LOCK):
            (state.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # a folder that the user named may hold other files
            state.folder.rmdir()


class _Children:
    """Children one after the other, to which the signals that end this process are passed on.

    Each child has a process group of its own: Ctrl-C, which a terminal sends to a whole group, then reaches it once and
    through us, as `kill` does. Ctrl-Z stops it with us.
    """

    def __init__(self) -> None:
        self.stopped: Stopped | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_Children":
        handlers: dict[int, Callable[[int, Any], None]] = {
            **dict.fromkeys((*STOPPING, signal.SIGHUP), self._end),
            signal.SIGTSTP: self._pause,
        }
        for number, handler in handlers.items() if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it for SIGHUP
                self._old[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def run(self, words: Sequence[str], lock: int) -> int:
        """Run one child to its end and return its exit code, 128 + n where signal n ended it."""
        if self.stopped is None:
            self._child = subprocess.Popen(words, process_group=0, pass_fds=(lock,))
        if self._child is None:
            return 0
        if self.stopped is not None:  # between the question above and the start
            self._send(self.stopped.signal)
        code = self._child.wait()
        self._child = None
        return 128 - code if code < 0 else code

    def _send(self, number: int) -> None:
        if self._child is not None and self._child.returncode is None:
            # A terminal that is closed ends a training as kill does: with a checkpoint.
            self._child.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def _end(self, number: int, _: Any) -> None:
        self.stopped = Stopped(number)
        self._send(number)

    def _pause(self, number: int, _: Any) -> None:
        group = self._child.pid if self._child is not None and self._child.returncode is None else None
        if group is not None:
            os.killpg(group, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)  # returns when we are continued
        if group is not None:
            os.killpg(group, signal.SIGCONT)
