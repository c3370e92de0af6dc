"""`visattn fit | validate | test`: from a recipe to a run folder.

`visattn.recipe_cli` validates the recipe and builds task, data module and Trainer; here they are put to work.
"""

import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from visattn import class_results, results
from visattn.base_task import TrainingTask
from visattn.callbacks import EpochTable, RandomState, TrainingProgress
from visattn.checkpoint import load_plain, read_checkpoint
from visattn.checkpoint_io import AtomicCheckpointIO
from visattn.errors import UserError
from visattn.failures import explained
from visattn.files import remove_leftovers, write_text_atomic
from visattn.recipe_cli import RecipeCLI, parse
from visattn.runs import LAST, ROOT, find_checkpoint, is_first_process, new_run, recipe_of, start_run, write_run
from visattn.signals import Stopped, StopRequest
from visattn.space import held, refuse_too_small, refuse_unwritable
from visattn.summary import amount, summarise
from visattn.survival import Averaging, EpochMeans, StopOnSignal

__all__ = ["RecipeCLI", "parse", "run_stage"]

RESULTS: dict[str, ModuleType] = {"classification": class_results, "segmentation": results}
"""For each kind of task what makes the results of a scoring, from `check_folder` to `show_results`."""


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
    request = StopRequest()
    request.install()
    try:
        with quiet():
            cli = parse(tree)
            if print_config:
                print(yaml.safe_dump(cli.resolved, sort_keys=False), end="")
                return 0
            root = Path(cli.config.trainer.default_root_dir or ROOT)
            folder = Path(run) if run else None
            if stage == "fit":
                return fit(cli, name, root, folder, ckpt_path, request)
            return evaluate(cli, stage, name, root, folder, ckpt_path or "best", request)
    except Stopped as stop:
        return _told(stop)
    except Exception:
        # A process of a distributed run that waits for another one, which was stopped, fails when that one ends.
        if request.signal is None or is_first_process():
            raise
        return 0
    finally:
        request.restore()


def _told(stop: Stopped) -> int:
    """Say what stopped the run and how to go on; the exit code."""
    if not is_first_process():
        return 0  # any other makes Lightning kill the first process, which may still have something to say
    notes = getattr(stop, "__notes__", ["the same command starts again"])
    print(f"visattn: stopped by {stop}: {notes[0]}", file=sys.stderr)
    return stop.exit_code


def _prepare(cli: RecipeCLI, name: str) -> tuple[TrainingTask, Any]:
    task, data = cli.build()
    task.recipe, task.recipe_name, task.data = cli.resolved, name, data
    return task, data


def fit(cli: RecipeCLI, name: str, root: Path, run: Path | None, ckpt_path: str | None, request: StopRequest) -> int:
    """Train; then score the best checkpoint on the validation cases and write the report."""
    checkpoint = None
    if ckpt_path is not None:
        checkpoint, own = find_checkpoint(ckpt_path, root, name, run)
        if own is None:
            raise UserError(f"--ckpt_path {ckpt_path}: lies in no run folder; to start from its weights, set init_from")
        run = own
    _check_machine(cli)
    refuse_unwritable(run or root, "--run" if run else "trainer.default_root_dir")
    task, data = _prepare(cli, name)
    _adopt(data, checkpoint)
    data.setup("fit")  # finds what is wrong with the data before a folder is made or a network built
    if not data.cases["val"]:
        raise UserError("data.split: there are no validation cases, and best.ckpt is chosen on them; set split.val")
    task.configure_model()  # finds what is wrong with network and loss, likewise
    # At the worst moment best and last lie beside the one that is being written.
    refuse_too_small(run or root, task.checkpoint_bytes(), 1 if checkpoint else 3)
    if checkpoint is None:
        run = start_run(root, name, run)
    else:
        _check_weights(task, checkpoint)  # before this recipe takes the place of the run's own config.yaml
    assert run is not None
    first = is_first_process()
    with held(run) if first else nullcontext(), explained(_advice(cli), str(run)):
        if first:
            RESULTS[task.kind].check_folder(run)  # refuses somebody's own masks/ before the training, not after it
            for folder in (run, run / "checkpoints"):
                remove_leftovers(folder)
            write_run(run, name)
            write_text_atomic(run / "config.yaml", yaml.safe_dump(task.recipe, sort_keys=False))
            data.write_splits(run / "splits.json")
        return _train(cli, task, data, run, checkpoint, request)


def _train(
    cli: RecipeCLI, task: TrainingTask, data: Any, run: Path, checkpoint: Path | None, request: StopRequest
) -> int:
    # Two callbacks: Lightning's own save_last renews last.ckpt only when best.ckpt changes. The best comes first, so
    # that last.ckpt knows of it.
    where: dict[str, Any] = {
        "dirpath": run / "checkpoints",
        "enable_version_counter": False,
        "save_on_train_epoch_end": True,
    }
    keep = ModelCheckpoint(filename="best", monitor=task.scores[0], mode="max", **where)
    last = ModelCheckpoint(filename="last", **where)
    stopper = StopOnSignal(request, run / LAST)
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
            EpochMeans(),  # logs what those below read
            *([Averaging()] if task.average is not None else []),
            EpochTable(run / "metrics.csv", task.scores),
            TrainingProgress(task.scores[0]),
            stopper,  # saves what those above have done
        ],
    )
    if trainer.is_global_zero:
        counts = ", ".join(f"{len(cases)} {split}" for split, cases in data.cases.items() if cases)
        print(f"run: {run}\ndata: {data.description}: {counts}\n{_costs(cli, task, data)}", file=sys.stderr)
    started = time.monotonic()
    try:
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        seconds = time.monotonic() - started
        _say_why_early(trainer)
        if not keep.best_model_path:
            raise UserError(
                f"no epoch was validated, so there is no best.ckpt and no report in {run}.\n"
                "Check trainer.max_epochs, check_val_every_n_epoch, limit_val_batches and fast_dev_run."
            )
        best = Path(keep.best_model_path)
        RESULTS[task.kind].start_scoring(run, task)
        trainer.validate(task, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
        report = RESULTS[task.kind].write_results(
            run, task, data, split="val", checkpoint=best, seconds=seconds, epoch=_epoch(best)
        )
    except Stopped as stop:
        stop.add_note(_how_to_continue(run, trainer, stopper.saved))
        _pass_on(stop, trainer, stopper)
        raise
    if trainer.is_global_zero:
        print(f"best checkpoint: {best}" + (f"\nreport: {report}" if report else ""), file=sys.stderr)
    return 0


def _costs(cli: RecipeCLI, task: TrainingTask, data: Any) -> str:
    """What the network consists of and takes, in two lines."""
    assert task.network is not None
    config, settings = task.config["network"], data.preprocessing
    name = " over ".join(str(config[key]) for key in ("name", "backbone") if config.get(key))
    shape = (settings.in_channels, *(getattr(settings, "patch", None) or settings.size))
    mixed = "16" in str(cli.config.trainer.precision)
    try:
        found = summarise(task.network, shape, data.batch_size)
    except UserError as error:  # a network that decides by the values that it sees: it trains all the same
        parameters = sum(each.numel() for each in task.network.parameters())
        return f"network: {name}, {parameters:,} parameters\nmemory: unknown; {error}"
    image = " x ".join(str(n) for n in shape)
    needed = amount(found.training_memory(mixed), "B")
    return (
        f"network: {name}, {found.layers} layers, {found.parameters:,} parameters, "
        f"{amount(found.flops, 'FLOPs')} for {image}\n"
        f"memory: about {needed} for a step of {data.batch_size}{' in 16 bits' if mixed else ''}, "
        f"{amount(found.inference_memory, 'B')} to predict one (computed; visattn models says how)"
    )


def _say_why_early(trainer: Any) -> None:
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message and trainer.is_global_zero:
            why = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
            print(f"stopped early after epoch {callback.stopped_epoch + 1}: {why}", file=sys.stderr)


def _how_to_continue(run: Path, trainer: Any, saved: bool) -> str:
    again = f"the same command with --run {run} --ckpt_path last"
    if saved:
        return f"{run / LAST} holds epoch {trainer.current_epoch + 1}, step {trainer.global_step}.\nContinue: {again}"
    if (run / LAST).is_file():
        return f"no step was made since {run / LAST} was saved.\nContinue: {again}"
    return f"before the first step, so nothing was saved.\nStart again: the same command with --run {run}"


def _pass_on(stop: Stopped, trainer: Any, stopper: StopOnSignal) -> None:
    """Stop the processes that Lightning started, unless they stopped at the same step as this one."""
    if trainer.world_size > 1 and not stopper.together and trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(stop.signal)


def _advice(cli: RecipeCLI) -> str:
    """Which keys need less memory when they are lowered, and what they are."""
    data = cli.config.data.init_args
    keys = [f"data.{key} ({data[key]})" for key in ("batch_size", "size", "patch") if data.get(key)]
    precision = str(cli.config.trainer.precision or "32-true")
    more = "" if "16" in precision else f", or set trainer.precision ({precision}) to bf16-mixed"
    return f"Lower {' or '.join(keys)}{more}.\ntrainer.accumulate_grad_batches makes up for a smaller batch."


def _check_machine(cli: RecipeCLI) -> None:
    """Refuse what Lightning refuses, before any work; and a precision for which it would silently take another."""
    cli.build_trainer(logger=False, enable_model_summary=False)
    given = cli.config.trainer
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if str(given.precision) in {"16", "16-mixed"} and (given.accelerator == "cpu" or not gpu):
        raise UserError(
            f"trainer.precision: {given.precision} needs a GPU, and this run is on a CPU; take bf16-mixed or 32-true"
        )


def evaluate(
    cli: RecipeCLI, stage: str, name: str, root: Path, run: Path | None, ckpt_path: str, request: StopRequest
) -> int:
    """Score a checkpoint on the validation or test cases; results go to `RUN/<stage>/`."""
    checkpoint, own = find_checkpoint(ckpt_path, root, name, run)
    _check_machine(cli)
    task, data = _prepare(cli, name)
    _adopt(data, checkpoint)
    data.setup(stage)
    split = "val" if stage == "validate" else "test"
    if not data.cases[split]:
        folder = "data.test_root or " if hasattr(data, "test_roots") else ""
        key = "data.split.val" if split == "val" else f"{folder}data.split.test"
        raise UserError(f"{stage}: the recipe names no {split} cases; set {key}")
    task.configure_model()
    _check_weights(task, checkpoint)
    if own is not None:
        task.recipe_name = recipe_of(own) or name
    output = (own if own is not None else new_run(root, name)) / stage
    RESULTS[task.kind].start_scoring(output, task)
    trainer = cli.build_trainer(
        logger=False, enable_checkpointing=False, enable_model_summary=False, plugins=[AtomicCheckpointIO()],
        callbacks=[TrainingProgress(task.scores[0]), StopOnSignal(request, output / LAST)],
    )  # fmt: skip
    started = time.monotonic()
    loop = trainer.validate if stage == "validate" else trainer.test
    with explained(_advice(cli), str(output)):
        loop(task, datamodule=data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        seconds = time.monotonic() - started
        RESULTS[task.kind].write_results(
            output, task, data, split=split, checkpoint=checkpoint, seconds=seconds, epoch=_epoch(checkpoint)
        )
    if trainer.is_global_zero:
        RESULTS[task.kind].show_results(output)
        print(f"results: {output}", file=sys.stderr)
    return 0


def _adopt(data: Any, checkpoint: Path | None) -> None:
    """Prepare volumes as they were for the checkpoint, whatever cases there are to learn from today."""
    if checkpoint is not None and hasattr(data, "adopt"):
        data.adopt(read_checkpoint(checkpoint).preprocessing, str(checkpoint))


def _check_weights(task: TrainingTask, checkpoint: Path) -> None:
    """Refuse a checkpoint whose labels or weights are not those of the recipe."""
    assert task.network is not None
    content = read_checkpoint(checkpoint)
    trained, own = task.meaning_of(content), task.meaning
    if trained != own:
        raise UserError(
            f"data.labels: {list(own[0])} are not the labels of {checkpoint}, in their order: "
            f"{list(trained[0])}.\nIts scores would belong to other classes."
        )
    given, wanted = content.state_dict, task.network.state_dict()
    wrong = [key for key in wanted if key not in given or given[key].shape != wanted[key].shape]
    wrong += [key for key in given if key not in wanted]
    if wrong:
        raise UserError(
            f"--ckpt_path: the network of the recipe is not that of {checkpoint}: {len(wrong)} entries differ "
            f"(first: {wrong[0]}).\n"
            "Give the recipe and keys that it was trained with; they stand in config.yaml of its run folder."
        )


def _epoch(checkpoint: Path) -> int:
    return int(load_plain(checkpoint)["epoch"])


@contextmanager
def quiet() -> Iterator[None]:
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
            ".*AMP with fp16 is not supported on CPU.*",  # which is refused
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
