"""Collecting what was found, and handing it over most severe first."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visattn.doctor.codes import KINDS, SEVERITIES, Kind, Severity

FORMAT = 1
"""Version of the JSON; fields may be added within a version, none removed or changed."""

MAX_FILES = 1000
"""Files of one kind that the JSON lists; `count` says how many there are."""


@dataclass(frozen=True)
class Place:
    """A file that a finding is about.

    Args:
        path: Its path below the folder that was examined, with forward slashes.
        note: What else is to be said about it, such as its twin; may be empty.
    """

    path: str
    note: str = ""


@dataclass
class Finding:
    """One kind of finding with all that it is about.

    Args:
        code: A key of `KINDS`.
        details: Sentences about the data set as a whole.
        places: Files; empty where the finding is about the data set.
    """

    code: str
    details: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """Severity, meaning and fix."""
        return KINDS[self.code]

    @property
    def severity(self) -> Severity:
        """error, warning or info."""
        return self.kind.severity

    @property
    def count(self) -> int:
        """How many files; where there are none, how many details."""
        return len(self.places) or len(self.details)

    @property
    def message(self) -> str:
        """What is the matter."""
        return self.kind.meaning + (": " + "; ".join(self.details) if self.details else "")

    def to_json(self) -> dict[str, Any]:
        """Plain Python, the entry of `findings` in the JSON."""
        return {
            "severity": self.severity,
            "code": self.code,
            "message": self.message,
            "count": self.count,
            "files": [{"path": place.path, "note": place.note} for place in self.places[:MAX_FILES]],
            "fix": self.kind.fix,
        }


class Findings:
    """Collects findings by code.

    Args:
        base: Paths are shown relative to this folder where they lie below it.
    """

    def __init__(self, base: Path | None = None) -> None:
        self._base = base
        self._found: dict[str, Finding] = {}

    def file(self, code: str, path: Path | str, note: str = "") -> None:
        """Note that the file `path` is of kind `code`; the same is noted once."""
        place = Place(self.shown(path), printable(note))
        finding = self._get(code)
        if place not in finding.places[-4:]:
            finding.places.append(place)

    def whole(self, code: str, detail: str) -> None:
        """Note something of kind `code` about the data set as a whole."""
        details = self._get(code).details
        if detail not in details:
            details.append(printable(detail))

    def shown(self, path: Path | str) -> str:
        """`path` as it is printed."""
        path = Path(path)
        if self._base is not None and path.is_relative_to(self._base):
            path = path.relative_to(self._base)
        return printable(path.as_posix())

    def has(self, code: str) -> bool:
        """Whether anything of kind `code` was found."""
        return code in self._found

    def sorted(self) -> list[Finding]:
        """All findings, the most severe first, in the order of the table within a severity."""
        order = {code: number for number, code in enumerate(KINDS)}
        return sorted(self._found.values(), key=lambda f: (SEVERITIES.index(f.severity), order[f.code]))

    def _get(self, code: str) -> Finding:
        if code not in KINDS:
            raise KeyError(f"{code} is in no table of visattn/doctor/codes.py")
        return self._found.setdefault(code, Finding(code))


def printable(text: str) -> str:
    """`text` without what moves a cursor or cannot be encoded: a file name must not write to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def counts(findings: Sequence[Finding]) -> dict[Severity, int]:
    """How many kinds were found of each severity."""
    found = Counter(finding.severity for finding in findings)
    return {severity: found[severity] for severity in SEVERITIES}
