"""`visattn fit`, `visattn validate`, `visattn test`: what takes a recipe."""

import argparse
from collections.abc import Sequence
from typing import Any

RECIPE_HELP = """\
Every key of the recipe can be set after the options, for example
  --data.root DIR  --trainer.devices 2  --trainer.max_epochs 20
  --model.network.backbone convnext_tiny
--data.group_by EXPR and --data.folds N are short for --data.split.group_by and
--data.split.folds.
--print_config prints the complete recipe with every key and its value."""


def add(commands: Any) -> None:
    """Register `fit`, `validate` and `test`."""
    texts = {
        "fit": "train a network from a recipe",
        "validate": "score a checkpoint on the recipe's validation cases",
        "test": "score a checkpoint on the recipe's test cases",
    }
    for name, text in texts.items():
        parser = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=RECIPE_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument(
            "--config",
            "-c",
            action="append",
            required=True,
            metavar="RECIPE",
            help="path of a YAML recipe, or the name of a packaged one; repeatable, later ones lie over earlier ones",
        )
        what = (
            "continue the run: last, or a checkpoint in its folder"
            if name == "fit"
            else "best (default), last or a file"
        )
        if name == "fit":
            parser.add_argument(
                "--folds",
                metavar="all|0,2",
                help="cross-validation: train all folds (data.split.folds, default 5) or some, one run for each; "
                "with --ckpt_path last: finished ones are kept, the others go on",
            )
        parser.add_argument("--ckpt_path", metavar="CKPT", help=what)
        parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/<recipe>/<time>, or the newest)")
        parser.add_argument("--print_config", action="store_true", help="print the complete recipe and stop")
        parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.recipe import resolve

    name, tree = resolve(options.config, rest)  # a mistake in the recipe is told before torch is imported
    if getattr(options, "folds", None) is not None:
        from visattn.folds import fit_folds

        return fit_folds(options.folds, name, tree, options.ckpt_path, options.run, options.print_config)
    from visattn.fit import run_stage

    return run_stage(options.command, name, tree, options.ckpt_path, options.run, options.print_config)
