"""`visattn convert`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visattn.errors import UserError

_EPILOG = """\
WEIGHTS is Keras's .h5 (needs pip install 'visattn[keras]'), .pth or
.safetensors, as the authors publish it. Arguments of the network follow as for
visattn.create_model: --classes 3 --filters '[16, 32, 128, 256, 256]'
A backbone's file is for timm.create_model(NAME, checkpoint_path=FILE); its
arguments are those of the constructor: --img_size 160"""


def add(commands: Any) -> None:
    """Register the command."""
    text = "write authors' weights (Keras .h5, .pth) as safetensors"
    parser = commands.add_parser(
        "convert",
        help=text,
        description=text,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="visattn convert WEIGHTS --model NAME --output W.safetensors\n       [--ARGUMENT VALUE ...]",
    )
    parser.add_argument("weights", type=Path, metavar="WEIGHTS")
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a network (agunet, att_swin_unet, daunet, pranet) or backbone (va_...)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="W.safetensors")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    arguments = arguments_of("convert", rest)
    from visattn.convert import convert_weights

    done = convert_weights(options.weights, options.model, options.output, arguments)
    for note in done.notes:
        print(f"note: {note}")
    print(f"{done.path}: {done.tensors} entries, {done.numbers:,} numbers; every one fits {options.model}")
    print(f"next, in Python: {done.call}")
    return 0


def arguments_of(command: str, rest: Sequence[str]) -> dict[str, Any]:
    """`--classes 3 --filters [4, 8]` as a dictionary, values read as YAML; `command` is what errors name.

    Raises:
        UserError: It is no list of keys and values.
    """
    import yaml

    found: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key or (not equals and not words):
            raise UserError(f"{command}: unexpected argument {word}.\nSee: visattn {command} --help")
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value if equals else words.pop(0))
        except yaml.YAMLError:
            raise UserError(
                f"{command}: the value of --{key} cannot be read; lists are written as '[16, 32]'"
            ) from None
    return found
