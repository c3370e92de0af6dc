"""A checked recipe against the typed signatures of task, data module and Trainer, by LightningCLI.

Before LightningCLI sees the recipe, `visattn.recipe` has refused every class that is not in a table; the import policy
set here is the second lock, and it also covers values that jsonargparse would import (callables, class paths on the
command line).
"""

import re
import warnings
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from typing import Any, cast

import lightning as L
import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI

from visattn import recipe as recipes
from visattn.base_task import TrainingTask
from visattn.data import DATA
from visattn.errors import UserError, did_you_mean, unknown

MONITORS = ("train/loss", "val/loss")  # besides the scores of the task


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

    def build(self) -> tuple[TrainingTask, Any]:
        """The task and the data module, from the classes that the tables name.

        Built here and not by jsonargparse, which would bury what their constructors say about a recipe.
        """
        task, data = (_named(section.class_path)(**section.init_args.as_dict()) for section in
                      (self.config.model, self.config.data))  # fmt: skip
        return task, data

    def build_trainer(self, **kwargs: Any) -> L.Trainer:
        """The Trainer of the recipe; `kwargs` win, and their callbacks are added to the recipe's."""
        own = self.config.trainer.as_dict()
        if own["profiler"] == "xla":  # Lightning's own refusal ends in a traceback
            raise UserError("trainer.profiler: xla needs a TPU; take simple, advanced or pytorch")
        given = own["callbacks"] or []
        more = kwargs.pop("callbacks", [])
        try:
            callbacks = [
                _named(item["class_path"])(**item.get("init_args", {}))
                for item in (given if isinstance(given, list) else [given])
            ]
            return L.Trainer(**{**own, **kwargs, "callbacks": [*callbacks, *more]})
        except (
            MisconfigurationException,
            ArithmeticError,
            ImportError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            # What Lightning says of a strategy, a device or a callback's value that cannot be.
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"trainer: {first[:300]}") from error


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
    check_keys(tree)
    try:
        with warnings.catch_warnings():
            # Raised because the process has a command line; we pass the merged recipe on purpose.
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            return RecipeCLI(tree)
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises ArgumentError, TypeError or ValueError, all with long texts
        raise UserError(_shorten(str(error))) from error


def check_keys(tree: dict[str, Any]) -> None:
    """Compare the keys of a checked recipe tree with what task, data module, Trainer and callbacks take.

    Raises:
        UserError: a key is unknown or missing, or one of the values that would fail late cannot be.
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
    root = (tree.get("trainer") or {}).get("default_root_dir")
    if isinstance(root, str) and "://" in root:
        raise UserError(f"trainer.default_root_dir: '{root:.200}' is an address; name a folder of this machine")
    for key in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        number = (tree.get("trainer") or {}).get(key)
        if isinstance(number, int) and number < 1:
            raise UserError(f"trainer.{key}: must be a whole number of at least 1, got {number}")
    recipes.check_keys("trainer", tree.get("trainer") or {}, signature(L.Trainer).parameters)
    scores = _named(tree["model"]["class_path"]).scores
    _check_callbacks((tree.get("trainer") or {}).get("callbacks") or [], (*MONITORS, *scores))


def _check_callbacks(given: Any, monitors: Sequence[str]) -> None:
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
        if "monitor" in parameters and arguments.get("monitor") not in monitors:
            raise unknown(f"score at {where}.monitor:", str(arguments.get("monitor")), monitors)


def _shorten(message: str) -> str:
    """The deepest key and expectation out of jsonargparse's nested message."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    where = ".".join(dict.fromkeys(key for key in (keys[:1] + keys[-1:]) if key)) or "recipe"
    given = re.findall(r"(?:Got value|Given value): (.*)", message)
    kinds = re.findall(r"Expected an? (?:<class ')?([\w.\[\], ']+?)'?>?(?:\.|$|\n| but)", message)
    literals = ", ".join(re.findall(r"Literal\[([^\]]+)\]", message))
    choices = list(dict.fromkeys(item.strip(" '") for item in literals.split(",") if item))
    if choices and given:
        hint = did_you_mean(given[0], choices)
        return f"{where}: '{given[0]}' is not a valid value.{hint}\nValid: {', '.join(choices)}"
    names = [kind for kind in dict.fromkeys(kinds) if kind != "NoneType" and not kind.startswith("typing")]
    if names and given:
        return f"{where}: expected {' or '.join(names)}, got '{given[0][:200]}'"
    return f"{where}: {message.strip().splitlines()[-1].strip()[:300]}"
