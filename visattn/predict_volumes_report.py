"""`report.html` of a cohort of volumes: a row for each case, with its picture where there is one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from visattn import NOTICE, __version__
from visattn.files import write_bytes_atomic
from visattn.predict_record import Entry, Record
from visattn.report import page_environment, picture_uri

if TYPE_CHECKING:
    from visattn.volume_predictor import VolumePredictor

REPORT = "report.html"

_PICTURES = 300  # cases that have a picture in the page; more would be tens of megabytes
_WIDTH = 800  # pixels


def write_report(output: Path, record: Record, predictor: "VolumePredictor") -> Path | None:
    """Write the report of the cases that were done with the current settings.

    Returns:
        The file; None where the extra `report` is not installed.
    """
    environment = page_environment()
    if environment is None:
        return None
    entries = [entry for _, entry in sorted(record.entries.items()) if entry.settings == record.settings_id]
    done = [entry for entry in entries if entry.state == "done"]
    page = environment.get_template("volumes.html").render(
        title=output.resolve().name,
        kind="volumes",
        version=__version__,
        notice=NOTICE,
        cases=[_case(output, entry, number < _PICTURES) for number, entry in enumerate(done)],
        failed=[
            {"name": entry.case or entry.mask, "error": entry.error} for entry in entries if entry.state == "failed"
        ],
        classes=_classes(done, predictor.labels.foreground),
        settings=_settings(predictor),
    )
    write_bytes_atomic(output / REPORT, page.encode())
    return output / REPORT


def _case(output: Path, entry: Entry, with_picture: bool) -> dict[str, Any]:
    pictures = [file for file in entry.files if file.endswith(".png")]
    path = output / pictures[0] if pictures and with_picture else None
    inside = path is not None and path.resolve().is_relative_to(output.resolve())
    return {
        "name": entry.case or entry.mask,
        "rows": entry.rows,
        "notes": entry.notes,
        "size": " x ".join(map(str, entry.size)),
        "seconds": entry.seconds,
        "picture": _thumbnail(path) if path is not None and inside else None,
    }


def _thumbnail(path: Path) -> str | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if picture.width > _WIDTH:
        height = round(picture.height * _WIDTH / picture.width)
        picture = picture.resize((_WIDTH, height), Image.Resampling.LANCZOS)
    return picture_uri(np.asarray(picture), True)


def _classes(entries: list[Entry], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """For each class how many cases have it, and the median of their volumes."""
    result = []
    for name in names:
        volumes = [float(row["ml"]) for entry in entries for row in entry.rows if row["class"] == name]
        there = [ml for ml in volumes if ml > 0]
        result.append({"name": name, "cases": len(there), "median": float(np.median(there)) if there else None})
    return result


def _settings(predictor: "VolumePredictor") -> list[tuple[str, str]]:
    engine, preprocessing = predictor.engine, predictor.preprocessing
    patch = "whole volumes" if engine.patch is None else " x ".join(map(str, engine.patch))
    return [
        ("network", str(predictor.checkpoints[0].network.get("name"))),
        ("networks averaged", str(len(predictor.networks))),
        ("channels", ", ".join(preprocessing.channels)),
        ("window", patch),
        ("overlap", f"{engine.overlap:g}"),
        ("mirror images", engine.tta),
        ("computed in", "float32" if engine.autocast is None else "bfloat16"),
        ("device", str(predictor.device)),
    ]
