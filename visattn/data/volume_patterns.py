"""Cases found by patterns: where each channel and the label of a case lie, as `{case}/*_t1c.nii.gz`.

`{case}` stands for the name of the case, a folder or a part of a file's name; `*`, `?` and `[...]` for whatever they
match within a name, `**` for any folders between.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from visattn.data.volume_case import Problem, VolumeCase
from visattn.data.volume_names import listed
from visattn.data.volume_pairs import VolumeScan
from visattn.errors import UserError, unknown

LABEL = "label"

_TOKENS = re.compile(r"\{case\}|\*\*/|\*|\?|\[[^\]/]+\]")


def scan_patterns(root: Path, name: str, patterns: Mapping[str, str], channels: Sequence[str] | None) -> VolumeScan:
    """List the cases whose files match the patterns.

    Args:
        root: The folder that the patterns start from.
        name: The root as the user wrote it.
        patterns: One for each channel, by its name, and one for `label`.
        channels: The channels of the recipe; None: all that have a pattern.

    Raises:
        UserError: A pattern is missing, cannot be used, or matches nothing.
    """
    there = [channel for channel in patterns if channel != LABEL]
    if LABEL not in patterns or not there:
        raise UserError(
            f"data.layout: needs a pattern for each channel and one for '{LABEL}', as in "
            f"{{t1c: '{{case}}/*_t1c.nii.gz', label: '{{case}}/*_seg.nii.gz'}}; got {listed(patterns)}"
        )
    wanted = list(channels) if channels is not None else there
    for channel in wanted:
        if channel not in there:
            raise unknown("channel: data.layout has no pattern for", channel, there)
    found: defaultdict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for part in (*wanted, LABEL):
        matches = _matches(root, part, patterns[part])
        if not matches:
            raise UserError(
                f"data.layout: no file below {name} matches {part}: {patterns[part]}\n"
                f"Found there: {listed(sorted(path.name for path in root.iterdir()))}"
            )
        for case, path in matches:
            found[case][part].append(path)
    cases, problems = [], []
    for case, have in sorted(found.items()):
        missing = [
            f"{part} ({patterns[part].replace('{case}', case)})" for part in (*wanted, LABEL) if part not in have
        ]
        doubled = [str(path.relative_to(root)) for paths in have.values() if len(paths) > 1 for path in paths]
        if missing:
            problems.append(Problem(case, f"{root}: case {case} has no {listed(missing)}", root))
        elif have[LABEL][0] in [have[channel][0] for channel in wanted]:
            problems.append(
                Problem(case, f"{have[LABEL][0]}: matches the patterns of a channel and of the label", root)
            )
        elif doubled:
            problems.append(Problem(case, f"{root}: case {case}: {listed(doubled)} match one pattern; narrow it", root))
        else:
            images = tuple(have[channel][0] for channel in wanted)
            cases.append(VolumeCase(case, images, have[LABEL][0], case, name))
    return VolumeScan("patterns", tuple(cases), tuple(problems), tuple(wanted))


def _matches(root: Path, part: str, pattern: str) -> list[tuple[str, Path]]:
    if "{case}" not in pattern or Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UserError(f"data.layout.{part}: {pattern!r} must hold {{case}} and lead into the data's folder")
    try:
        expression = _expression(pattern)
        paths = sorted(root.glob(pattern.replace("{case}", "*")))
    except (ValueError, re.error) as error:  # ** beside other characters, [z-a]
        raise UserError(f"data.layout.{part}: {pattern!r} is no pattern ({error})") from None
    result = []
    for path in paths:
        match = expression.fullmatch(path.relative_to(root).as_posix())
        if match and path.is_file() and not path.name.startswith("."):
            result.append((match["case"], path))
    return result


def _expression(pattern: str) -> re.Pattern[str]:
    """A regular expression for the pattern that captures the case."""
    text, end, seen = "", 0, False
    for token in _TOKENS.finditer(pattern):
        text += re.escape(pattern[end : token.start()])
        end = token.end()
        if token[0] == "{case}":
            text += "(?P=case)" if seen else "(?P<case>[^/]+)"
            seen = True
        elif token[0] == "**/":
            text += "(?:[^/]+/)*"
        elif token[0].startswith("["):
            text += token[0].replace("[!", "[^", 1)
        else:
            text += "[^/]*" if token[0] == "*" else "[^/]"
    return re.compile(text + re.escape(pattern[end:]))
