"""Runs compared case by case: a table of paired differences, a plot, and the cases that differ most.

`runs.py` reads the scored folders and refuses those that cannot be compared, `result.py` computes and puts into words,
`show.py` prints, `pictures.py` draws and `page.py` makes the report. The statistics are those of `metrics/paired.py`.
"""

from visattn.compare.command import compare_runs

__all__ = ["compare_runs"]
