"""`visattn doctor`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visattn.errors import UserError, nearest

_EPILOG = """\
DIR is a folder of images with masks, of volumes with labels, or of folders of
images, one for each class; or a table of images with classes (.csv), or a file
of MedMNIST's form (.npz).

With --config the recipe's data is examined as training would read and divide
it; its keys can be set after the options, as for fit:
  --data.root DIR  --data.split.val 0.2
The exit code is 1 if there is an error, 0 if there are only warnings, 2 if
there was nothing to examine."""


def add(commands: Any) -> None:
    """Register the command."""
    text = "find what is wrong with a data set before training on it"
    parser = commands.add_parser(
        "doctor",
        help=text,
        description=text,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="visattn doctor [-h] [--json] [--groups FILE] DIR\n"
        "       visattn doctor [-h] [--json] [--groups FILE] --config RECIPE\n"
        "                      [--data.KEY VALUE ...]",
    )
    # DIR is not declared: argparse would take the value of the recipe's --data.KEY for it.
    parser.add_argument("--config", "-c", action="append", metavar="RECIPE", help="examine the data of a recipe")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--groups",
        type=Path,
        metavar="FILE",
        help="write a table of which images belong together (videos, copies, patients), for data.split.group_by",
    )
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    folder = None
    if not options.config:
        names = [word for word in rest if not word.startswith("-")]
        rest = [word for word in rest if word.startswith("-")]
        _refuse(names[1:], rest)
        folder = Path(names[0]) if names else None
    from visattn.doctor import run_doctor

    return run_doctor(folder, options.config, rest, as_json=options.json, groups=options.groups)


def _refuse(names: Sequence[str], options: Sequence[str]) -> None:
    """Without a recipe there is nothing to set."""
    if not names and not options:
        return
    word = (*options, *names)[0]
    if word.startswith(("--data.", "--model.", "--trainer.")):
        raise UserError(f"doctor: {word} changes a key of a recipe, and needs --config RECIPE")
    guess = nearest(word, ["--json", "--config", "--groups"]) if word.startswith("-") else None
    hint = f" Did you mean {guess}?" if guess else ""
    raise UserError(f"doctor: unexpected argument {word}.{hint}\nSee: visattn doctor --help")
