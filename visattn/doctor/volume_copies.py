"""The same volume or label twice, exactly or nearly; and whether the parts of a split share it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from visattn.doctor.findings import Findings
from visattn.doctor.volume_reading import SeenVolume
from visattn.doctor.volumes import TINY, path_of

_SAME = 0.9995  # correlation of signatures from which two volumes are nearly the same


def check_repeats(
    seen: Sequence[SeenVolume], parts: Mapping[str, str], groups: Mapping[str, str], findings: Findings
) -> list[tuple[int, int]]:
    """The same volume twice, exactly or nearly; pairs of indices of `seen` that belong together are returned."""
    ties: list[tuple[int, int]] = []
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for index, one in enumerate(seen):
        if one.channels and any(channel.constant is None for channel in one.channels):
            by_digest[one.digest].append(index)
    for first, *others in by_digest.values():
        ties += [(first, other) for other in others]
        for other in others:
            _tell_twins(seen, first, other, "", parts, groups, findings)
    singles = [indices[0] for indices in by_digest.values()]
    for a, b, alike in _near(seen, singles):
        ties.append((a, b))
        _tell_twins(seen, a, b, f"{alike:.4f} alike", parts, groups, findings)
    by_label: dict[bytes, list[int]] = defaultdict(list)
    for index, one in enumerate(seen):
        if (
            one.label is not None
            and (one.label.values != 0).any()
            and one.label.counts[one.label.values != 0].sum() > TINY
        ):
            by_label[one.label.digest].append(index)
    for first, *others in by_label.values():
        for other in others:
            if seen[first].digest != seen[other].digest:
                findings.file(
                    "mask-repeated", path_of(seen[other].case), f"= {findings.shown(path_of(seen[first].case))}"
                )
    return ties


def _near(seen: Sequence[SeenVolume], indices: Sequence[int]) -> list[tuple[int, int, float]]:
    """Pairs whose signatures correlate in every channel, less what all volumes of the set share."""
    by_count: dict[int, list[int]] = defaultdict(list)
    for index in indices:
        by_count[len(seen[index].channels)].append(index)
    found = []
    for count, these in by_count.items():
        alike = np.ones((len(these), len(these)))
        for c in range(count):
            signatures = np.array([seen[index].channels[c].signature.ravel() for index in these], np.float64)
            flat = ~signatures.any(axis=1)
            product = signatures @ signatures.T
            product[flat] = product[:, flat] = 0
            alike = np.minimum(alike, product)
        rows, columns = np.nonzero(np.triu(alike >= _SAME, 1))
        found += [
            (these[a], these[b], float(alike[a, b])) for a, b in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
    return found


def _tell_twins(
    seen: Sequence[SeenVolume],
    first: int,
    second: int,
    note: str,
    parts: Mapping[str, str],
    groups: Mapping[str, str],
    findings: Findings,
) -> None:
    one, other = seen[first].case, seen[second].case
    path, twin = (case.images[0] if case.images else Path(case.name) for case in (other, one))
    text = f"= {findings.shown(twin)}{f' ({note})' if note else ''}"
    homes = parts.get(one.name), parts.get(other.name)
    if None not in homes and homes[0] != homes[1]:
        code = "near-duplicate-across-parts" if note else "duplicate-across-parts"
        findings.file(code, path, f"{text}; {homes[0]} and {homes[1]}")
    elif one.name not in groups or groups[one.name] != groups.get(other.name):
        findings.file("volume-near-duplicate" if note else "volume-duplicate", path, text)
    a, b = seen[first].label, seen[second].label
    if not note and a is not None and b is not None and a.digest != b.digest:
        findings.file("same-image-different-masks", path_of(other), f"= {findings.shown(path_of(one))}")
