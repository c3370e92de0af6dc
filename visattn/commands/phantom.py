"""`visattn phantom`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visattn.data.phantoms import IMAGE_KINDS, VOLUME_KINDS


def add(commands: Any) -> None:
    """Register the command."""
    text = "write synthetic images with masks, or synthetic volumes with labels, to a folder"
    phantom = commands.add_parser("phantom", help=text, description=text)
    phantom.add_argument(
        "folder", type=Path, metavar="DIR", help="gets images/ and masks/; imagesTr/, labelsTr/, dataset.json"
    )
    phantom.add_argument(
        "--kind",
        choices=(*IMAGE_KINDS, *VOLUME_KINDS),
        default=IMAGE_KINDS[0],
        help="images like colonoscopy (polyp), dermatoscopy (skin), the back of the eye (vessels) or microscopy "
        "(nuclei); volumes like contrast-enhanced T1, some with meningiomas (head), or T1 of a hippocampus in two "
        "parts (default: polyp)",
    )
    phantom.add_argument("--count", type=_whole, default=24, help="how many (default: 24)")
    phantom.add_argument("--seed", type=_whole, default=1, help="another seed, other images (default: 1)")
    phantom.set_defaults(call=_call)


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is below 0")
    return number


def _call(options: argparse.Namespace, rest: Sequence[str]) -> int:
    if options.kind in VOLUME_KINDS:
        from visattn.data.phantom_volumes import WRITERS
        from visattn.progress import Bar

        with Bar("drawing", options.count) as bar:
            WRITERS[options.kind](options.folder, options.count, options.seed, bar.advance)
        print(f"{options.count} synthetic {'heads' if options.kind == 'head' else 'volumes'}: {options.folder}")
        return 0
    from visattn.data.phantom import write_phantom

    write_phantom(options.folder, options.count, options.seed, kind=options.kind)
    print(f"{options.count} synthetic images: {options.folder}")
    return 0
