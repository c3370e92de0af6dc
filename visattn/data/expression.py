"""Regular expressions from a recipe, matched in a process of their own, because some of them never end.

`^(a+)+$` on a name of forty letters takes longer than a life. Python's `re` knows no limit of time and cannot be
stopped from another thread; a process can.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

SECONDS = 20.0
"""For all names together; a sound expression takes milliseconds for thousands of them."""

_MATCH = """
import json, re, sys
expression, names = json.load(sys.stdin)
try:
    pattern = re.compile(expression)
except (re.error, RecursionError, OverflowError, MemoryError) as error:
    answer = f"is no regular expression ({error})"
else:
    if pattern.groups == 1:
        answer = [match and match[1] for match in map(pattern.search, names)]
    else:
        answer = "needs exactly one group in parentheses, as in '^(patient[0-9]+)_', or FILE.csv:COLUMN"
json.dump(answer, sys.stdout)
"""


def match_one_group(expression: str, names: Sequence[str]) -> list[str | None]:
    """What the one group of `expression` matches in each name; None where nothing matches.

    Raises:
        ValueError: It is no regular expression, has not exactly one group, or does not end in time. The message goes
            behind the expression.
    """
    question = json.dumps([expression, list(names)])  # ASCII, so that names that are no UTF-8 pass through
    try:
        # Isolated (-I) and without site packages (-S): nothing but the standard library is imported, in 20 ms.
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH], input=question, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"takes more than {SECONDS:g} seconds for {len(names)} names.\n"
            "Simplify it: repeats within repeats, as in (a+)+, can take for ever."
        ) from None
    if done.returncode:
        raise ValueError(f"cannot be matched ({(done.stderr.strip().splitlines() or ['no answer'])[-1][:200]})")
    answer: list[str | None] | str = json.loads(done.stdout)
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer
