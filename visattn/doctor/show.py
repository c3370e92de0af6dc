"""What `visattn doctor` prints: the findings by kind, most severe first, or JSON."""

import json
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from visattn.data.cases import Case
from visattn.doctor.findings import FORMAT, Finding, counts, printable

_SHOWN = 4  # files of one kind
_LONGEST = 100  # characters of one file's line
_COLOURS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Report:
    """The result of an examination.

    Args:
        data: What was examined, as the user named it.
        images: The cases.
        labels: The label map, as a recipe's labels block, or None where none could be guessed.
        guessed: Whether `labels` was guessed from the masks.
        findings: Most severe first.
        ties: Pairs of indices of `images` that belong together.
        classes: Names of the classes, of data to classify.
    """

    data: list[str]
    images: list[Case]
    labels: dict[str, Any] | None
    guessed: bool
    findings: list[Finding]
    ties: list[tuple[int, int]]
    classes: list[str] | None = None

    @property
    def cases(self) -> int:
        """How many there are."""
        return len(self.images)

    @property
    def exit_code(self) -> int:
        """1 if there is an error, else 0."""
        return int(any(finding.severity == "error" for finding in self.findings))

    def codes(self) -> dict[str, int]:
        """How often each kind was found, by code."""
        return {finding.code: finding.count for finding in self.findings}

    def to_json(self) -> dict[str, Any]:
        """Plain Python; docs/doctor.md says what each key means."""
        return {
            "format": FORMAT,
            "data": self.data,
            "cases": self.cases,
            "labels": self.labels,
            "labels_guessed": self.guessed,
            "classes": self.classes,
            "counts": counts(self.findings),
            "findings": [finding.to_json() for finding in self.findings],
        }


def show(report: Report, as_json: bool) -> None:
    """Print the report."""
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for finding in report.findings:
        _show_finding(console, finding)
    found = counts(report.findings)
    told = ", ".join(_plural(found[severity], severity) for severity in ("error", "warning"))
    console.print(Text(f"{', '.join(report.data)}: {_plural(report.cases, 'case')}, {told}"))
    if report.classes is not None:
        console.print(Text(f"classes: {'; '.join(printable(name) for name in report.classes)}"))
    if report.labels is not None:
        how = "read with the labels guessed from the masks" if report.guessed else "read with the recipe's labels"
        console.print(Text(f"masks {how}: {json.dumps(report.labels, ensure_ascii=False).replace(chr(34), '')}"))


def _show_finding(console: Console, finding: Finding) -> None:
    head = Text()
    head.append(f"{finding.severity:8}", style=_COLOURS[finding.severity])
    head.append(finding.code, style="bold")
    if finding.places:
        head.append(f"  {_plural(finding.count, 'file')}", style="dim")
    console.print(head)
    lines = [finding.kind.meaning]
    if finding.details:
        lines = [f"{finding.kind.meaning}:", *(f"- {detail}" for detail in finding.details[: 4 * _SHOWN])]
    shown = _SHOWN if finding.severity != "info" else 1
    for place in finding.places[:shown]:
        between = " " if place.note.startswith(("=", "(")) else ": "
        lines.append(_cut(f"- {place.path}{between}{place.note}" if place.note else f"- {place.path}"))
    if len(finding.places) > shown:
        lines.append(f"- and {len(finding.places) - shown} more")
    if finding.severity != "info":
        lines.append(f"fix: {finding.kind.fix}")
    for line in lines:
        console.print(Padding(Text(line), (0, 0, 0, 8)) if sys.stdout.isatty() else Text(" " * 8 + line))


def _cut(line: str) -> str:
    """The beginning and the end of a long line, so that a file's name stays whole where it can."""
    return line if len(line) <= 2 * _LONGEST else f"{line[:_LONGEST]} ... {line[-_LONGEST:]}"


def _plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
