"""The command line: parse, call one function. Nothing heavy is imported before a command needs it."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from visattn import NOTICE, __version__
from visattn.commands import COMMANDS
from visattn.errors import UserError, did_you_mean, nearest, readable


class _Parser(argparse.ArgumentParser):
    """Argument parser whose mistakes are `UserError`s; options are written out, as a recipe's keys are."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}\nSee: {self.prog} --help")


def _build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="visattn",
        description="Attention networks for medical images: train from a recipe, predict masks.",
        epilog=NOTICE,
    )
    parser.add_argument("--version", action="version", version=f"visattn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=_Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser, commands.choices


def _check_command(arguments: Sequence[str], known: Sequence[str]) -> None:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if arguments and arguments[0] == command and command not in known:
        raise UserError(f"unknown command '{command}'.{did_you_mean(command, known)}\nCommands: {', '.join(known)}")


def _check_rest(parser: argparse.ArgumentParser, command: str, rest: Sequence[str]) -> None:
    """Only commands that take a recipe or a network accept further keys."""
    if not rest or command in {"fit", "validate", "test", "doctor", "convert", "models"}:
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
        print(readable(f"visattn: error: {error}"), file=sys.stderr)
        return 2
    except MemoryError:
        print("visattn: error: out of memory: the machine has too little for this input", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("visattn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `visattn models | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a folder that may not be listed, a file that went away meanwhile
        if error.filename is None or error.strerror is None:
            raise  # nothing to tell the user: a defect of ours
        print(readable(f"visattn: error: {os.fsdecode(error.filename)}: {error.strerror}"), file=sys.stderr)
        return 2


def run() -> NoReturn:
    """Entry point of the `visattn` command."""
    sys.exit(main())
