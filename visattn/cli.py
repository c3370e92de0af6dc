"""The command line: parse, call one function. Nothing heavy is imported before a command needs it."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from visattn import NOTICE, __version__
from visattn.errors import UserError, nearest

RECIPE_HELP = """\
Every key of the recipe can be set after the options, for example
  --data.root DIR  --model.network.backbone convnext_tiny  --trainer.devices 2  --trainer.max_epochs 20
--print_config prints the complete recipe with every key and its value."""


class _Parser(argparse.ArgumentParser):
    """Argument parser whose mistakes are `UserError`s; options are written out, as a recipe's keys are."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\nSee: {self.prog} --help")


def _add_recipe_commands(commands: Any) -> None:
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
        parser.add_argument("--ckpt_path", metavar="CKPT", help=what)
        parser.add_argument("--run", metavar="DIR", help="run folder (default: runs/<recipe>/<time>, or the newest)")
        parser.add_argument("--print_config", action="store_true", help="print the complete recipe and stop")
        parser.set_defaults(call=_run_stage)


def _add_predict(commands: Any) -> None:
    text = "write masks for images or folders of images"
    parser = commands.add_parser("predict", help=text, description=text)
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="image file, or folder searched with its subfolders"
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="C", help=".ckpt of a run, or exported .safetensors"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder for masks; mirrors the input folders"
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="also write 16-bit PNG probabilities, one for each class"
    )
    parser.add_argument("--overlays", action="store_true", help="also write images with the prediction's outline")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="foreground from this probability on (default: 0.5)"
    )
    parser.add_argument(
        "--tta", choices=("none", "flips"), default="none", help="average over flipped images (default: none)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: auto")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is already there")
    parser.set_defaults(call=_predict)


def _build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="visattn",
        description="Attention networks for medical images: train from a recipe, predict masks.",
        epilog=NOTICE,
    )
    parser.add_argument("--version", action="version", version=f"visattn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=_Parser)
    _add_recipe_commands(commands)
    _add_predict(commands)

    text = "list the packaged recipes"
    listing = commands.add_parser("recipes", help=text, description=text)
    listing.add_argument("--json", action="store_true", help="as JSON")
    listing.set_defaults(call=_recipes)

    text = "list the networks"
    models = commands.add_parser("models", help=text, description=text)
    models.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern of names (default: *)"
    )
    models.add_argument("--json", action="store_true", help="as JSON")
    models.set_defaults(call=_models)

    text = "write a checkpoint's weights as safetensors with a JSON description"
    export = commands.add_parser("export-weights", help=text, description=text)
    export.add_argument("checkpoint", type=Path, metavar="CKPT")
    export.add_argument("--output", required=True, type=Path, metavar="W.safetensors")
    export.set_defaults(call=_export_weights)

    text = "write the embedded synthetic images and masks to a folder"
    phantom = commands.add_parser("phantom", help=text, description=text)
    phantom.add_argument("folder", type=Path, metavar="DIR", help="gets images/ and masks/")
    phantom.add_argument("--count", type=int, default=24, help="number of images (default: 24)")
    phantom.add_argument("--seed", type=int, default=1, help="another seed, other images (default: 1)")
    phantom.set_defaults(call=_phantom)
    return parser, commands.choices


def _run_stage(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.recipe import resolve

    name, tree = resolve(options.config, rest)  # a mistake in the recipe is told before torch is imported
    from visattn.fit import run_stage

    return run_stage(options.command, name, tree, options.ckpt_path, options.run, options.print_config)


def _predict(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.predict import predict_folder

    return predict_folder(
        options.inputs,
        options.checkpoint,
        options.output,
        probabilities=options.probabilities,
        overlays=options.overlays,
        threshold=options.threshold,
        tta=options.tta,
        device=options.device,
        overwrite=options.overwrite,
    )


def _table(rows: Sequence[dict[str, Any]], as_json: bool, columns: Sequence[str] = ()) -> int:
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    columns = columns or list(rows[0])
    for column in columns:
        long = column == "about"
        table.add_column(column, no_wrap=column == "name", min_width=26 if long else None, overflow="fold")
    for row in rows:
        values = (row[column] for column in columns)
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in values))
    Console().print(table)
    return 0


def _recipes(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.networks import describe
    from visattn.recipe import describe_recipes

    about = {row["name"]: row for row in describe()}
    rows = []
    for row in describe_recipes():
        network = about.get(row["network"].split(" + ")[0], {})
        rows.append(row | {key: network.get(key, "") for key in ("parameters", "paper", "licence")})
    return _table(rows, options.json, ("name", "network", "about"))


def _models(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from fnmatch import fnmatch

    from visattn.networks import describe

    rows = [row for row in describe() if fnmatch(row["name"], options.pattern)]
    if not rows:
        raise UserError(f"no model matches '{options.pattern}'. See: visattn models")
    return _table(rows, options.json)


def _export_weights(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.checkpoint import export_weights

    for path in export_weights(options.checkpoint, options.output):
        print(path)
    return 0


def _phantom(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.data.phantom import write_phantom

    write_phantom(options.folder, options.count, options.seed)
    print(f"{options.count} synthetic images: {options.folder}")
    return 0


def _check_command(arguments: Sequence[str], known: Sequence[str]) -> None:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if arguments and arguments[0] == command and command not in known:
        guess = nearest(command, known)
        hint = f" Did you mean '{guess}'?" if guess else ""
        raise UserError(f"unknown command '{command}'.{hint}\nCommands: {', '.join(known)}")


def _check_rest(parser: argparse.ArgumentParser, command: str, rest: Sequence[str]) -> None:
    """Only commands that take a recipe accept further keys."""
    if not rest or command in {"fit", "validate", "test"}:
        return
    name = rest[0].split("=")[0]
    guess = nearest(name, re.findall(r"--\w[\w-]*", parser.format_help()))
    hint = f" Did you mean {guess}?" if guess else ""
    raise UserError(f"{command}: unknown argument {name}.{hint}\nSee: visattn {command} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 some cases failed, 2 a mistake in what was asked."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parser, commands = _build_parser()
        _check_command(arguments, list(commands))
        options, rest = parser.parse_known_args(arguments)
        if options.command is None:
            parser.print_help()
            return 0
        _check_rest(commands[options.command], options.command, rest)
        call: Callable[[argparse.Namespace, Sequence[str]], int] = options.call
        return call(options, rest)
    except UserError as error:
        print(f"visattn: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("visattn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `visattn models | head`
        sys.stderr.close()
        return 0


def run() -> NoReturn:
    """Entry point of the `visattn` command."""
    sys.exit(main())
