"""`visattn gna`: what a neighbourhood attention costs, as a table, as JSON and as a picture."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from visattn.errors import UserError

if TYPE_CHECKING:
    from visattn.attention._simulator import Simulation

TILE = 64  # queries, and keys, of a tile where none is given: what kernels on GPUs take, and whole in every rank
LONGEST = 65536  # positions of an axis; counting takes a step for each
NEARBY = 5
BYTES = 2  # of a number in half precision


def report_gna(options: Namespace) -> int:
    """Print the counts for the settings in `options` (see `visattn gna --help`), and draw them; the exit code 0.

    Raises:
        UserError: If a setting cannot be read, or does not fit.
    """
    size = _numbers("size", options.size)
    if len(size) > 3 or max(size) > LONGEST:
        raise UserError(f"--size {options.size}: a map has one to three axes of at most {LONGEST} positions, as 56x56")
    head_dim = _numbers("head_dim", options.head_dim)
    if len(head_dim) != 1:
        raise UserError(f"--head_dim {options.head_dim}: one number is needed, as 32")
    found = _simulate(size, options)
    if options.picture is not None:
        if options.picture.suffix.lower() != ".png":
            raise UserError(f"--picture {options.picture}: pictures are PNG files, name it something.png")
        from visattn.viz import draw_neighborhood

        draw_neighborhood(found, options.picture)
    near = _near(found, options)
    best = found.best_tile()
    if options.json:
        print(json.dumps(_facts(found, best, near, head_dim[0]), indent=2))
    else:
        _show(found, best, near, head_dim[0])
        if options.picture is not None:
            print(f"picture: {options.picture}")
    return 0


def _numbers(name: str, text: str, rank: int | None = None) -> tuple[int, ...]:
    """The integers of `text`, as 7 or 7x9; a single one is repeated for `rank` axes."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", text.strip()):
        raise UserError(f"--{name} {text}: positive numbers joined by x are needed, as 7 or 7x7")
    values = tuple(int(part) for part in text.split("x"))
    if rank is not None and len(values) == 1:
        values *= rank
    if rank is not None and len(values) != rank:
        raise UserError(f"--{name} {text}: one number, or one for each of the {rank} axes of --size")
    return values


def _simulate(size: tuple[int, ...], options: Namespace) -> "Simulation":
    rank = len(size)
    kernel, stride, dilation = (
        _numbers(name, getattr(options, name), rank) for name in ("kernel", "stride", "dilation")
    )
    if not re.fullmatch(r"([0-9](,[0-9])*)?", options.causal) or any(
        int(axis) >= rank for axis in options.causal.split(",") if axis
    ):
        raise UserError(
            f"--causal {options.causal}: numbers of axes joined by commas are needed, from 0 to {rank - 1}, as 0"
        )
    causal = tuple(str(axis) in options.causal.split(",") for axis in range(rank))
    given = {name: getattr(options, name) for name in ("tile_q", "tile_kv")}
    start = {name: _numbers(name, text, rank) if text else (TILE, *(1,) * (rank - 1)) for name, text in given.items()}
    for name, tile in start.items():
        if math.prod(tile) > LONGEST:
            raise UserError(f"--{name} {given[name]}: a tile has at most {LONGEST} positions")
    from visattn.attention import simulate

    try:
        found = simulate(size, kernel, stride, dilation, causal, **start)
    except ValueError as error:
        raise UserError(str(error)) from None
    return found.best_tile(queries=not given["tile_q"], keys=not given["tile_kv"])


def _near(found: "Simulation", options: Namespace) -> "list[Simulation]":
    """The nearest other settings that waste nothing: on the tiles asked for, or on tiles with equal sides.

    Tiles that suit a sliding window are seldom those that suit blocks.
    """
    side = (round(TILE ** (1 / len(found.size))),) * len(found.size)
    even = replace(
        found,
        tile_q=found.tile_q if options.tile_q else side,
        tile_kv=found.tile_kv if options.tile_kv else side,
    )
    near = even.nearby_block_sparse(most=NEARBY + 1)
    return [each for each in near if each.axes != found.axes][:NEARBY]


def _joined(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _facts(found: "Simulation", best: "Simulation", near: "list[Simulation]", head_dim: int) -> dict[str, Any]:
    """Everything that is counted, for one head of one map."""
    kernel, stride, dilation, causal = (list(values) for values in zip(*found.axes, strict=True))
    return {
        "size": list(found.size),
        "kernel": kernel,
        "stride": stride,
        "dilation": dilation,
        "causal": causal,
        "tile_q": list(found.tile_q),
        "tile_kv": list(found.tile_kv),
        "head_dim": head_dim,
        "products": {
            "needed": found.pairs,
            "computed": found.computed,
            "full_attention": math.prod(found.size) ** 2,
            "full_attention_on_tiles": found.full,
        },
        "flops": found.flops(head_dim),
        "flops_computed": 4 * head_dim * found.computed,
        "flops_full_attention": 4 * head_dim * math.prod(found.size) ** 2,
        "bytes": found.bytes(head_dim, BYTES),
        "speedup_on_tiles": found.speedup,
        "speedup_bound": found.ideal,
        "block_sparse": found.block_sparse,
        "best_tile": {
            "tile_q": list(best.tile_q),
            "tile_kv": list(best.tile_kv),
            "computed": best.computed,
            "speedup_on_tiles": best.speedup,
        },
        "nearby_block_sparse": [
            {
                "kernel": [axis.kernel for axis in each.axes],
                "stride": [axis.stride for axis in each.axes],
                "tile_q": list(each.tile_q),
                "tile_kv": list(each.tile_kv),
                "needed": each.pairs,
                "speedup_on_tiles": each.speedup,
            }
            for each in near
        ],
    }


def _show(found: "Simulation", best: "Simulation", near: "list[Simulation]", head_dim: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    kernel, stride, dilation, causal = zip(*found.axes, strict=True)
    setting = f"kernel {_joined(kernel)}, stride {_joined(stride)}, dilation {_joined(dilation)}"
    if any(causal):
        setting += ", causal on axis " + ", ".join(str(axis) for axis, value in enumerate(causal) if value)
    full = math.prod(found.size) ** 2
    rows = [
        ("map", _joined(found.size)),
        ("attention", setting),
        ("keys of a query, on average", f"{found.pairs / math.prod(found.size):,.1f}"),
        ("operations, forward", f"{found.flops(head_dim):,}  (full attention: {4 * head_dim * full:,})"),
        ("bytes moved, forward", f"{found.bytes(head_dim, BYTES):,}  (half precision, each tensor once)"),
        ("tiles", f"{_joined(found.tile_q)} queries, {_joined(found.tile_kv)} keys"),
        ("products needed", f"{found.pairs:,}"),
        ("products computed on tiles", f"{found.computed:,}  ({found.computed / found.pairs:.2f}x what is needed)"),
        ("faster than full attention", f"at most {found.speedup:.2f}x on these tiles, {found.ideal:.2f}x on any"),
        ("perfectly block-sparse", "yes: no product is wasted" if found.block_sparse else "no"),
    ]
    if best.computed < found.computed:
        tiles = f"{_joined(best.tile_q)} queries, {_joined(best.tile_kv)} keys"
        rows.append(("best tiles of this size", f"{tiles}: {best.speedup:.2f}x"))
    table = Table(box=box.SIMPLE_HEAD, title=f"One head of {head_dim} channels, one map", title_justify="left")
    table.add_column("count", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    if not near:
        console.print("No setting with a kernel up to 2 away is perfectly block-sparse.")
        return
    tiles = f"{_joined(near[0].tile_q)} queries and {_joined(near[0].tile_kv)} keys"
    table = Table(
        box=box.SIMPLE_HEAD, title=f"Nearby and perfectly block-sparse, on tiles of {tiles}", title_justify="left"
    )
    for name in ("kernel", "stride", "products", "faster than full"):
        table.add_column(name, justify="left" if name in ("kernel", "stride") else "right")
    for each in near:
        kernel, stride, _, _ = zip(*each.axes, strict=True)
        table.add_row(_joined(kernel), _joined(stride), f"{each.pairs:,}", f"{each.speedup:.2f}x")
    console.print(table)
