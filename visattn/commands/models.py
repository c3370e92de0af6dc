"""`visattn models`."""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from visattn.commands._table import show_table
from visattn.commands.convert import arguments_of
from visattn.errors import UserError, did_you_mean

_EPILOG = """\
with --size, arguments of the model follow as for visattn.create_model:
visattn models unet --size 96x96x96 --backbone va_pyramid3d_tiny --decoder halo"""


def add(commands: Any) -> None:
    """Register the command."""
    text = "list networks and what composes, or say what one of them costs"
    models = commands.add_parser(
        "models", help=text, description=text, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="shell pattern of names (default: *)"
    )
    models.add_argument("--task", choices=("segmentation", "classification"), help="all that a recipe of it may name")
    models.add_argument("--json", action="store_true", help="as JSON")
    models.add_argument(
        "--size", type=_size, metavar="96x96x96", help="compute layers, parameters, operations and memory of one model"
    )
    models.add_argument("--in-channels", type=_count, metavar="N", help="channels of the image (with --size)")
    models.add_argument("--classes", type=_count, metavar="K", help="output channels (with --size)")
    models.add_argument(
        "--batch", type=_count, default=2, metavar="N", help="images in a step of training (with --size; default: 2)"
    )
    models.set_defaults(call=_call)


def _size(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,2}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 224, 352x352 or 96x96x96")
    sides = tuple(int(side) for side in text.split("x"))
    return sides * 2 if len(sides) == 1 else sides


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number above 0")
    return int(text)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.size is not None:
        return _summary(options, rest)
    if rest or options.in_channels or options.classes:
        word = rest[0].partition("=")[0] if rest else "--in-channels" if options.in_channels else "--classes"
        hint = did_you_mean(word, ("--task", "--json", "--size", "--in-channels", "--classes", "--batch"))
        raise UserError(
            f"models: unexpected argument {word} without --size.{hint if rest else ''}\nSee: visattn models --help"
        )
    return _listing(options)


def _listing(options: argparse.Namespace) -> int:
    from visattn.networks import describe
    from visattn.networks.listing import Task, compositions

    if options.task is None and options.pattern == "*":
        code = show_table(describe(), options.json)
        if not options.json:
            print("Backbones, skips, decoders and attention: visattn models --task segmentation")
        return code
    tasks: list[Task] = [options.task] if options.task else ["segmentation", "classification"]
    found = {kind: rows for task in tasks for kind, rows in compositions(task, options.pattern).items()}
    if not found:
        raise UserError(f"no model matches '{options.pattern}'. See: visattn models --task segmentation")
    if options.task is None and set(found) == {"networks"}:
        return show_table(found["networks"], options.json)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for kind, rows in found.items():
        print(f"{kind}:")
        if kind == "backbones":
            rows = _families(rows)
        if kind == "networks":
            show_table(rows, False, ("name", "input", "paper"))
        elif set(rows[0]) == {"name"}:
            print("  " + ", ".join(row["name"] for row in rows) + "\n")
        else:
            show_table(rows, False)
    if "backbones" in found and options.pattern == "*":
        print("Any other timm model that gives feature maps is a backbone too.")
    return 0


def _families(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Backbones of a family in one row."""
    families: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        entry = families.setdefault((row["family"], row["input"]), {**row, "name": []})
        entry["name"].append(row["name"])
    return [
        {"family": entry["family"], "input": entry["input"], "names": ", ".join(entry["name"])}
        for entry in families.values()
    ]


def _summary(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from dataclasses import asdict

    from visattn.networks.listing import build_model
    from visattn.summary import amount, summarise

    if set(options.pattern) & set("*?["):
        raise UserError(f"models: --size needs the name of one model, got '{options.pattern}'")
    name, rank = options.pattern, len(options.size)
    network, channels = build_model(name, rank, options.in_channels, options.classes, arguments_of("models", rest))
    found = summarise(network, (channels, *options.size), options.batch)
    if options.json:
        extra = {"inference_memory": found.inference_memory, "training_memory": found.training_memory()}
        print(json.dumps({"name": name, **asdict(found), **extra}, indent=2))
        return 0
    rows = [
        {
            "layer": f"{'  ' * part.depth}{part.name}",
            "kind": part.kind,
            "output": _shapes(part.output),
            "parameters": part.parameters,
        }
        for part in found.parts
    ]
    if rows:
        show_table(rows, False)
    frozen = found.parameters - found.trainable
    for title, text in (
        ("input", _shapes([found.input])),
        ("output", _shapes(found.output)),
        ("layers", f"{found.layers} with parameters"),
        ("parameters", f"{found.parameters:,}" + (f", {frozen:,} of them without use and frozen" if frozen else "")),
        (
            "operations",
            f"{amount(found.flops, 'FLOPs')} for one image: matrix products, convolutions and attention, "
            "a multiplication and an addition as two",
        ),
        ("inference", f"{amount(found.inference_memory, 'B')} for one image, without gradients"),
        (
            "training",
            f"{amount(found.training_memory(), 'B')} for a step of {found.batch} with Adam; "
            f"about {amount(found.training_memory(mixed=True), 'B')} in bf16-mixed",
        ),
        ("memory is", "computed from the tensors that live at once; kernels, the loss and CUDA itself take more"),
    ):
        print(f"{title:11} {text}")
    return 0


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    """`32 x 48 x 48`, several apart by commas."""
    most = 4
    texts = [" x ".join(str(n) for n in shape) for shape in shapes[:most]]
    return ", ".join([*texts, *(["..."] if len(shapes) > most else [])]) or "-"
