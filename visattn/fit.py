"""`visattn fit | validate | test`: from a recipe to a run folder.

`visattn.recipe_cli` validates the recipe and builds task, data module and Trainer; here they are put to work.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from visattn.callbacks import EpochTable, RandomState, TrainingProgress
from visattn.checkpoint import load_plain, read_checkpoint
from visattn.checkpoint_io import AtomicCheckpointIO
from visattn.errors import UserError
from visattn.files import write_text_atomic
from visattn.labels import Labels
from visattn.recipe_cli import RecipeCLI, parse
from visattn.results import earlier_masks, start_scoring, write_results
from visattn.runs import ROOT, find_checkpoint, is_first_process, new_run, start_run
from visattn.task import SegmentationTask

__all__ = ["RecipeCLI", "parse", "run_stage"]

MONITOR = "val/dice"


def run_stage(
    stage: str,
    name: str,
    tree: dict[str, Any],
    ckpt_path: str | None = None,
    run: str | None = None,
    print_config: bool = False,
) -> int:
    """Train, validate or test as the recipe says.

    Args:
        stage: `fit`, `validate` or `test`.
        name: Name of the recipe; its runs are kept together under it.
        tree: The recipe, as `visattn.recipe.resolve` returns it.
        ckpt_path: `last`, `best` or a file. For `fit`: continue this training in its own folder.
        run: The run folder, instead of a new one (`fit`) or the newest one (with `ckpt_path`).
        print_config: Print the complete recipe and stop.

    Returns:
        The exit code, 0.
    """
    if stage != "fit":  # the checkpoint brings the weights
        arguments = tree["model"]["init_args"]
        arguments["init_from"] = None
        if isinstance(arguments.get("network"), dict):
            arguments["network"] = {**arguments["network"], "pretrained": False}
    with _quiet():
        cli = parse(tree)
        if print_config:
            print(yaml.safe_dump(cli.resolved, sort_keys=False), end="")
            return 0
        root = Path(cli.config.trainer.default_root_dir or ROOT)
        folder = Path(run) if run else None
        if stage == "fit":
            return fit(cli, name, root, folder, ckpt_path)
        return evaluate(cli, stage, name, root, folder, ckpt_path or "best")


def _prepare(cli: RecipeCLI, name: str) -> tuple[SegmentationTask, Any]:
    task, data = cli.build()
    task.recipe, task.recipe_name, task.data = cli.resolved, name, data
    return task, data


def fit(cli: RecipeCLI, name: str, root: Path, run: Path | None, ckpt_path: str | None) -> int:
    """Train; then score the best checkpoint on the validation cases and write the report."""
    checkpoint = None
    if ckpt_path is not None:
        checkpoint, own = find_checkpoint(ckpt_path, root, name, run)
        if own is None:
            raise UserError(f"--ckpt_path {ckpt_path}: lies in no run folder; to start from its weights, set init_from")
        run = own
    task, data = _prepare(cli, name)
    data.setup("fit")  # finds what is wrong with the data before a folder is made or a network built
    if not data.cases["val"]:
        raise UserError("data.split: there are no validation cases, and best.ckpt is chosen on them; set split.val")
    task.configure_model()  # finds what is wrong with network and loss, likewise
    if checkpoint is None:
        run = start_run(root, name, run)
    else:
        _check_weights(task, checkpoint)  # before this recipe takes the place of the run's own config.yaml
    assert run is not None
    if is_first_process():
        earlier_masks(run)  # refuses somebody's own masks/ before the training, not after it
        write_text_atomic(run / "config.yaml", yaml.safe_dump(task.recipe, sort_keys=False))
        data.write_splits(run / "splits.json")

    # Two callbacks: Lightning's own save_last renews last.ckpt only when best.ckpt changes. The best comes first, so
    # that last.ckpt knows of it.
    where: dict[str, Any] = {
        "dirpath": run / "checkpoints",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    keep = ModelCheckpoint(filename="best", monitor=MONITOR, mode="max", **where)
    last = ModelCheckpoint(filename="last", **where)
    trainer = cli.build_trainer(
        default_root_dir=str(run),
        logger=TensorBoardLogger(run, name="tensorboard", version=""),
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,  # the data module's sampler shards by rank itself
        enable_model_summary=False,
        callbacks=[
            keep,
            last,
            RandomState(int(cli.config.seed_everything)),
            EpochTable(run / "metrics.csv"),
            TrainingProgress(),
        ],
    )
    if trainer.is_global_zero:
        counts = ", ".join(f"{len(cases)} {split}" for split, cases in data.cases.items() if cases)
        print(f"run: {run}\ndata: {data.description}: {counts}", file=sys.stderr)
    started = time.monotonic()
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise UserError(f"interrupted. Continue with: --ckpt_path last --run {run}")
    seconds = time.monotonic() - started
    if not keep.best_model_path:
        raise UserError(
            f"no epoch was validated, so there is no best.ckpt and no report in {run}.\n"
            "Check trainer.max_epochs, check_val_every_n_epoch, limit_val_batches and fast_dev_run."
        )
    best = Path(keep.best_model_path)
    start_scoring(run, task)
    trainer.validate(task, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
    report = write_results(run, task, data, split="val", checkpoint=best, seconds=seconds, epoch=_epoch(best))
    if trainer.is_global_zero:
        print(f"best checkpoint: {best}" + (f"\nreport: {report}" if report else ""), file=sys.stderr)
    return 0


def evaluate(cli: RecipeCLI, stage: str, name: str, root: Path, run: Path | None, ckpt_path: str) -> int:
    """Score a checkpoint on the validation or test cases; results go to `RUN/<stage>/`."""
    checkpoint, own = find_checkpoint(ckpt_path, root, name, run)
    task, data = _prepare(cli, name)
    data.setup(stage)
    split = "val" if stage == "validate" else "test"
    if not data.cases[split]:
        key = "data.split.val" if split == "val" else "data.test_root or data.split.test"
        raise UserError(f"{stage}: the recipe names no {split} cases; set {key}")
    task.configure_model()
    _check_weights(task, checkpoint)
    if own is not None and (own / "summary.json").is_file():  # the recipe given here may be the run's config.yaml
        task.recipe_name = json.loads((own / "summary.json").read_text())["recipe"]
    output = (own if own is not None else new_run(root, name)) / stage
    start_scoring(output, task)
    trainer = cli.build_trainer(
        logger=False, enable_checkpointing=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
        callbacks=[TrainingProgress()],
    )  # fmt: skip
    started = time.monotonic()
    loop = trainer.validate if stage == "validate" else trainer.test
    loop(task, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    seconds = time.monotonic() - started
    write_results(output, task, data, split=split, checkpoint=checkpoint, seconds=seconds, epoch=_epoch(checkpoint))
    if trainer.is_global_zero:
        print(f"results: {output}", file=sys.stderr)
    return 0


def _check_weights(task: SegmentationTask, checkpoint: Path) -> None:
    """Refuse a checkpoint whose labels or weights are not those of the recipe."""
    assert task.network is not None
    content = read_checkpoint(checkpoint)
    trained = Labels.from_config(**content.labels)
    # The values in the files may differ (0 and 1, 0 and 255); what the channels mean may not.
    if (trained.names, trained.regions) != (task.labels.names, task.labels.regions):
        raise UserError(
            f"data.labels: {list(task.labels.names)} are not the labels of {checkpoint}, in their order: "
            f"{list(trained.names)}.\nIts scores would belong to other classes."
        )
    given, own = content.state_dict, task.network.state_dict()
    wrong = [key for key in own if key not in given or given[key].shape != own[key].shape]
    wrong += [key for key in given if key not in own]
    if wrong:
        raise UserError(
            f"--ckpt_path: the network of the recipe is not that of {checkpoint}: {len(wrong)} entries differ "
            f"(first: {wrong[0]}).\n"
            "Give the recipe and keys that it was trained with; they stand in config.yaml of its run folder."
        )


def _epoch(checkpoint: Path) -> int:
    return int(load_plain(checkpoint)["epoch"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what Lightning says to developers; warnings about the user's data and settings stay."""
    import logging

    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    os.environ.setdefault("PL_DISABLE_TIPS", "1")
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",
            ".*The number of training batches.*is smaller than the logging interval.*",
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*isinstance.treespec, LeafSpec.*",
            ".*callbacks used to create the checkpoint need to be provided.*",
            ".*could not find the monitored key.*",  # before the first validation of several epochs
            ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
