"""What a finished run of a classifier leaves for people: the table of cases, the summary, curves and the report."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from visattn.class_scored import case_rows
from visattn.classification import ClassificationTask
from visattn.evaluate_show import entries_in, print_class_table
from visattn.report import write_curves, write_report
from visattn.results import describe_run
from visattn.runs import is_first_process
from visattn.scored import CASES, Input, write_cases, write_inputs, write_summary


def check_folder(folder: Path) -> None:
    """Nothing of somebody else's would be replaced in a run folder: all our files have names of their own."""


def start_scoring(folder: Path, task: ClassificationTask) -> None:
    """Make the next validation or test a scoring, whose results `write_results` puts into `folder`."""
    task.full = True
    if is_first_process():
        folder.mkdir(parents=True, exist_ok=True)


def write_results(
    folder: Path,
    task: ClassificationTask,
    data: Any,
    split: str,
    checkpoint: Path,
    seconds: float,
    epoch: int,
) -> Path | None:
    """Write `cases.csv`, `summary.json`, `inputs.json`, `curves.png` and `report.html`.

    Arguments and result are those of `visattn.results.write_results`, and like there every process calls this.
    """
    keys, table = task.validation_metrics.table()
    if not is_first_process():
        return None
    write_cases(folder / CASES, case_rows(keys, table), split)
    by_name = {(case.group, case.name): case for case in data.cases[split]}
    inputs = []
    for name, group in keys:
        case = by_name[group, name]
        inputs.append(Input(case=name, group=group, root=case.root, image=case.image, truth=None, prediction=None))
    write_inputs(folder, inputs)
    summary = {
        **describe_run(folder, task, data, split, checkpoint, seconds, epoch),
        "task": task.kind,
        "metrics": [asdict(entry) for entry in table.summarise()],
        "means": table.means(),
        "confusion": table.confusion(),
        "calibration": table.calibration(),
    }
    write_summary(folder, summary)
    if (folder / "metrics.csv").is_file():
        write_curves(folder)
    return write_report(folder)


def show_results(folder: Path) -> None:
    """Print the measures that `write_results` put into `folder`."""
    print_class_table(entries_in(folder))
