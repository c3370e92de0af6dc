"""What every page shares: the template engine with its filters, and pictures as data URIs."""

import base64
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visattn.metrics import METRICS, Summary, digits
from visattn.metrics.classes import CLASS_METRICS

if TYPE_CHECKING:
    from jinja2 import Environment

WIDEST = 1100  # pixels; wider pictures are made smaller, so that a report stays a few megabytes
TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


def page_environment() -> "Environment | None":
    """Templates of pages, everything escaped; None where the extra `report` is not installed.

    Pages extend `_base.html`, which needs `title`, `kind` (report, comparison), `version` and `notice`, and take pieces
    from `_macros.html`. Filters: `score(unit)` for a number, `interval` for a `Summary`, `count` for a whole number,
    `percent` for a share.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        return None
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(TEMPLATES),
    )
    environment.filters |= {"score": score, "interval": interval, "count": count, "percent": percent}
    return environment


def score(value: float | None, unit: str = "") -> str:
    """A score with three decimals, or with its unit's; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    return f"{value:.{digits(unit, 3)}f}" + (f"\u00a0{unit}" if unit else "")


def interval(entry: Summary) -> str:
    """The interval of a measure, or a dash."""
    places = digits({**METRICS, **CLASS_METRICS}[entry.metric].unit, 3)
    if not (math.isfinite(entry.low) and math.isfinite(entry.high)):
        return "\u2013"
    return f"{entry.low:.{places}f}\u2009\u2013\u2009{entry.high:.{places}f}"


def count(value: int) -> str:
    """A whole number in groups of three digits."""
    return f"{value:,}".replace(",", "\u202f")


def percent(share: float | None) -> str:
    """A share in percent; what is not quite nothing, or not quite all, never looks as if it were."""
    if share is None:
        return "\u2013"
    text = f"{100 * share:.1f}"
    text = "<\u20090.1" if share > 0 and text == "0.0" else ">\u200999.9" if share < 1 and text == "100.0" else text
    return f"{text}\u00a0%"


def picture_uri(source: Path | NDArray[np.uint8], photograph: bool) -> str | None:
    """A picture for a page as a data URI, the only address that its policy allows.

    Args:
        source: A PNG file, or RGB pixels (H, W, 3).
        photograph: Whether it may become a JPEG of at most `WIDEST` pixels, as overlays should; drawings stay sharp.

    Returns:
        The URI; None if the file cannot be read.
    """
    try:
        if isinstance(source, Path):
            with Image.open(source, formats=["PNG"]) as image:
                picture = image.convert("RGB")
        else:
            picture = Image.fromarray(source)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    data, kind = io.BytesIO(), "png"
    if photograph:  # without colour subsampling, which smears thin outlines
        if picture.width > WIDEST:
            picture = picture.resize((WIDEST, round(picture.height * WIDEST / picture.width)), Image.Resampling.LANCZOS)
        kind = "jpeg"
        picture.save(data, "JPEG", quality=88, subsampling=0)  # optimize=True fails on noisy pictures
    else:
        picture.save(data, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
