"""What every report of a scored folder shows, whatever its task: title, run, data, curves, confusion, calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visattn import NOTICE, __version__
from visattn.curves import read_metrics
from visattn.errors import UserError
from visattn.report.page import picture_uri
from visattn.report.pixels import Calibration, Confusion, read_calibration, read_confusion
from visattn.scored import AGAIN, SUMMARY

STAGES = ("validate", "test")  # folders of evaluations within a run folder
_CLASSES = "classification"
CAPTION = 6  # names that are listed


def shared_context(run_dir: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates of reports share.

    Raises:
        UserError: An entry of the summary has another form.
    """
    about = summary.get("data")
    data = {"description": "", "fingerprint": "", "counts": {}} | (about if isinstance(about, dict) else {})
    config, curves = run_dir / "config.yaml", run_dir / "curves.png"
    confusion, calibration = _pixels(summary, run_dir / SUMMARY)
    return {
        "notice": NOTICE,
        "version": __version__,
        "kind": "report",
        "title": _title(summary, run_dir),
        "folder": _place(run_dir),
        "evaluated": summary.get("prediction") is not None,
        "trained": bool(summary.get("checkpoint") or summary.get("folds")),
        "confusion": confusion,
        "calibration": calibration,
        "facts": _facts(summary, read_metrics(run_dir / "metrics.csv").get("epoch", {})),
        "data": data,
        "phantom": "phantom" in str(data["description"]).lower(),
        "versions": summary.get("versions") if isinstance(summary.get("versions"), dict) else {},
        "curves": picture_uri(curves, photograph=False) if curves.is_file() else None,
        "recipe": config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
    }


def _title(summary: Mapping[str, Any], run_dir: Path) -> str:
    if summary.get("recipe"):
        return str(summary["recipe"])
    if isinstance(summary.get("prediction"), str):
        path = Path(summary["prediction"])
        return "/".join(path.parts[-2:]) if path.name == "masks" else path.name  # every run has its masks/
    return run_dir.resolve().name


def _place(run_dir: Path) -> str:
    path = run_dir.resolve()
    return f"{path.parent.name}/{path.name}" if path.name in STAGES else path.name


def _pixels(summary: Mapping[str, Any], path: Path) -> tuple[Confusion | None, Calibration | None]:
    sides = ("no", "yes") if summary.get("task") == _CLASSES else ("outside", "inside")
    try:
        return (
            read_confusion(summary["confusion"], sides) if summary.get("confusion") else None,
            read_calibration(summary["calibration"]) if summary.get("calibration") else None,
        )
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: confusion or calibration has another form: {error}.\n{AGAIN}") from error


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _facts(summary: Mapping[str, Any], epochs: Mapping[int, float]) -> dict[str, str]:
    facts: dict[str, str] = {}
    what = "classes" if summary.get("task") == _CLASSES else "masks"
    for key, name in (("prediction", f"Predicted {what}"), ("truth", f"True {what}")):
        if summary.get(key):
            facts[name] = str(summary[key])
    for key, name in (("missing", "Without prediction, counted as misses"), ("extra", "Without truth, not scored")):
        names = summary.get(key)
        if isinstance(names, list) and names:
            facts[name] = (
                f"{len(names)}: {', '.join(map(str, names[:CAPTION]))}{', ...' if len(names) > CAPTION else ''}"
            )
    if summary.get("group_by"):
        facts["Grouped by"] = str(summary["group_by"])
    if summary.get("checkpoint"):
        facts["Checkpoint"] = str(summary["checkpoint"])
    best = summary.get("best_epoch")
    if isinstance(best, int):
        facts["Its epoch"] = f"{best + 1} of {max(len(epochs), best + 1)}" if epochs else str(best + 1)
    if isinstance(summary.get("seconds"), int | float):
        facts["Duration"] = _duration(summary["seconds"])
    if summary.get("hardware"):
        facts["Hardware"] = str(summary["hardware"])
    return facts
