"""`visattn fit | validate | test`: from a recipe to a run folder.

LightningCLI validates the recipe against the typed signatures of task, data module and Trainer. Before it sees the
recipe, `visattn.recipe` has refused every class that is not in a table; the import policy set here is the second lock,
and it also covers values that jsonargparse would import (callables, class paths on the command line).
"""

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, cast

import lightning as L
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from visattn import recipe as recipes
from visattn.callbacks import EpochTable, RandomState, TrainingProgress
from visattn.checkpoint import load_plain, read_checkpoint
from visattn.checkpoint_io import AtomicCheckpointIO
from visattn.data import DATA
from visattn.errors import UserError, nearest, unknown
from visattn.files import write_text_atomic
from visattn.labels import Labels
from visattn.results import write_results
from visattn.runs import ROOT, find_checkpoint, is_first_process, new_run, start_run
from visattn.task import SegmentationTask

MONITOR = "val/dice"
MONITORS = ("train/loss", "val/loss", "val/dice", "val/iou")


class RecipeCLI(LightningCLI):
    """LightningCLI as a parser alone: it validates and builds, and leaves the Trainer to `run_stage`."""

    def __init__(self, tree: dict[str, Any]) -> None:
        allowed = [*recipes.TASKS.values(), *DATA.values(), *recipes.CALLBACKS.values()]
        # LightningCLI switches reading over fsspec on, which would fetch URLs; subclass specs inside values of type
        # Any would be instantiated. Both off: a recipe is data.
        set_parsing_settings(
            import_path_denylist=["*"],
            import_path_allowlist=[*allowed, *(_home(path) for path in allowed)],
            config_read_mode_fsspec_enabled=False,
            config_read_mode_urls_enabled=False,
            validate_subclass_spec_in_any=False,
            instantiate_subclass_spec_in_any=False,
        )
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=tree,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def instantiate_classes(self) -> None:
        """Nothing yet: building waits until the recipe is known to be right as a whole."""

    @property
    def resolved(self) -> dict[str, Any]:
        """The complete recipe with every default, as plain values."""
        text = cast(ArgumentParser, self.parser).dump(self.config)
        return cast(dict[str, Any], yaml.safe_load(text))

    def build(self) -> tuple[SegmentationTask, Any]:
        """The task and the data module, from the classes that the tables name.

        Built here and not by jsonargparse, which would bury what their constructors say about a recipe.
        """
        task, data = (_named(section.class_path)(**section.init_args.as_dict()) for section in
                      (self.config.model, self.config.data))  # fmt: skip
        return task, data

    def build_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer of the recipe; `kwargs` win, and their callbacks are added to the recipe's."""
        own = self.config.trainer.as_dict()
        given = own["callbacks"] or []
        callbacks = [
            _named(item["class_path"])(**item.get("init_args", {}))
            for item in (given if isinstance(given, list) else [given])
        ]
        callbacks += kwargs.pop("callbacks", [])
        try:
            return L.Trainer(**{**own, **kwargs, "callbacks": callbacks})
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error


def _named(path: str) -> Any:
    """The class at a dotted path that a table gave."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _home(path: str) -> str:
    """The path under which Python itself knows a re-exported class."""
    cls = _named(path)
    return f"{cls.__module__}.{cls.__qualname__}"


def parse(tree: dict[str, Any]) -> RecipeCLI:
    """Validate a checked recipe tree against the signatures.

    Raises:
        UserError: a key is unknown or a value has the wrong type; jsonargparse's own text is cut to what matters.
    """
    seed = tree.get("seed_everything", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed_everything: must be a whole number from 0 to 2**32 - 1, got '{seed}'")
    # One seed for everything, unless the recipe asks for another split or order; explicit, so that config.yaml says it.
    tree["data"]["init_args"].setdefault("seed", seed)
    for section in ("model", "data"):
        path, given = tree[section]["class_path"], tree[section]["init_args"]
        parameters = signature(_named(path)).parameters
        recipes.check_keys(section, given, parameters)
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in given:
                raise UserError(f"{section}: the key '{key}' is missing from init_args of {path.rpartition('.')[2]}")
    recipes.check_keys("trainer", tree.get("trainer") or {}, signature(L.Trainer).parameters)
    _check_callbacks((tree.get("trainer") or {}).get("callbacks") or [])
    try:
        with warnings.catch_warnings():
            # Raised because the process has a command line; we pass the merged recipe on purpose.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            return RecipeCLI(tree)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises ArgumentError, TypeError or ValueError, all with long texts
        raise UserError(_shorten(str(error))) from error


def _check_callbacks(given: Any) -> None:
    """Refuse keys that a callback does not take, and a monitor that no epoch logs."""
    for index, item in enumerate(given if isinstance(given, list) else [given]):
        where, spec = f"trainer.callbacks[{index}]", item if isinstance(item, dict) else {"class_path": item}
        name = recipes.class_name(where, spec["class_path"], recipes.CALLBACKS)
        arguments = spec.get("init_args") or {}
        parameters = signature(_named(recipes.CALLBACKS[name])).parameters
        recipes.check_keys(where, arguments, parameters)
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in arguments and "kwargs" not in key:
                raise UserError(f"{where}: the key '{key}' is missing from init_args of {name}")
        if "monitor" in parameters and arguments.get("monitor") not in MONITORS:
            raise unknown(f"score at {where}.monitor:", str(arguments.get("monitor")), MONITORS)


def _shorten(message: str) -> str:
    """The deepest key and expectation out of jsonargparse's nested message."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    where = ".".join(dict.fromkeys(key for key in (keys[:1] + keys[-1:]) if key)) or "recipe"
    given = re.findall(r"(?:Got value|Given value): (.*)", message)
    kinds = re.findall(r"Expected an? (?:<class ')?([\w.\[\], ']+?)'?>?(?:\.|$|\n| but)", message)
    literals = ", ".join(re.findall(r"Literal\[([^\]]+)\]", message))
    choices = list(dict.fromkeys(item.strip(" '") for item in literals.split(",") if item))
    if choices and given:
        guess = nearest(given[0], choices)
        hint = f" Did you mean '{guess}'?" if guess else ""
        return f"{where}: '{given[0]}' is not a valid value.{hint}\nValid: {', '.join(choices)}"
    names = [kind for kind in dict.fromkeys(kinds) if kind != "NoneType" and not kind.startswith("typing")]
    if names and given:
        return f"{where}: expected {' or '.join(names)}, got '{given[0][:200]}'"
    return f"{where}: {message.strip().splitlines()[-1].strip()[:300]}"


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
    task.suite = "full"
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
    task.suite = "full"
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
