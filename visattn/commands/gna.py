"""`visattn gna`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """Register the command."""
    text = "count the work of a neighbourhood attention and find its best tile"
    parser = commands.add_parser("gna", help=text, description=text)
    parser.add_argument("--size", required=True, metavar="HxW", help="the map, as 56x56 or 24x24x24")
    parser.add_argument("--kernel", required=True, metavar="K", help="one number, or one for each axis, as 7x7")
    parser.add_argument("--stride", default="1", metavar="S", help="default: 1")
    parser.add_argument("--dilation", default="1", metavar="D", help="default: 1")
    parser.add_argument("--causal", default="", metavar="AXES", help="causal axes by number, as 0 or 0,2")
    parser.add_argument("--tile_q", metavar="T", help="query tile of the kernel, as 8x8 (default: the best of 64)")
    parser.add_argument("--tile_kv", metavar="T", help="key tile of the kernel (default: the best of 64)")
    parser.add_argument("--head_dim", default="32", metavar="D", help="channels of a head (default: 32)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw what queries see and what tiles compute")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(call=_call)


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from visattn.gna import report_gna

    return report_gna(options)
