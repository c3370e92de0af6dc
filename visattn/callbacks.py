"""What happens around the training steps: reproducible random numbers, progress, the table of epochs."""

import csv
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from visattn.files import write_text_atomic


class RandomState(L.Callback):
    """Makes a resumed run equal to an uninterrupted one.

    Every training batch starts from generators seeded by (seed, epoch, batch, rank). So nothing drawn elsewhere (a
    sanity check, a validation, a restart) shifts what a step draws, on any device of a distributed run, and no
    generator's state needs to be saved.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed torch for this batch and rank."""
        # SeedSequence mixes the numbers, so neighbouring seeds, epochs, batches and ranks do not share streams.
        entropy = np.random.SeedSequence([self.seed, trainer.current_epoch, batch_idx, trainer.global_rank])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


class EpochTable(L.Callback):
    """Writes `metrics.csv`, one row for each finished epoch; a resumed run continues the table.

    Args:
        path: The file.
        scores: What the task logs after each validation, besides the loss.
    """

    def __init__(self, path: Path, scores: Sequence[str]) -> None:
        self.path = path
        self._columns = ("epoch", "step", "train/loss", "val/loss", *scores, "lr", "seconds")
        self._rows: list[dict[str, str]] = []
        self._started = 0.0
        self._validated = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the rows of the epochs that the checkpoint has seen."""
        if self.path.is_file():
            with self.path.open(newline="") as handle:
                self._rows = [row for row in csv.DictReader(handle) if int(row["epoch"]) < trainer.current_epoch]
        self._started = time.monotonic()  # where training goes on within an epoch, no epoch starts

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the epoch's clock."""
        self._started = time.monotonic()
        self._validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note that this epoch has scores of its own; Lightning goes on showing those of the last validation."""
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add this epoch's row."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        row: dict[str, str] = {"epoch": str(trainer.current_epoch), "step": str(trainer.global_step)}
        for key, value in trainer.callback_metrics.items():
            if key in self._columns and (self._validated or not key.startswith("val/")):
                row[key] = f"{float(value):.6g}"
        row["seconds"] = f"{time.monotonic() - self._started:.2f}"
        self._rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text_atomic(self.path, text.getvalue())


class TrainingProgress(ProgressBar):
    """One bar over the whole training with the time left; without a terminal, one line for each epoch.

    Args:
        score: What the task logs that is shown beside the loss.
    """

    def __init__(self, score: str) -> None:
        super().__init__()
        self._score = score
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._enabled = True
        self._started = 0.0

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar at the step that training starts from."""
        self._started = time.monotonic()
        if not self._enabled or not sys.stderr.isatty():
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[scores]}"),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._bar.start()
        per_epoch = int(trainer.num_training_batches)
        total = per_epoch * (trainer.max_epochs or 1)
        if trainer.max_steps > 0:
            total = min(total, trainer.max_steps * trainer.accumulate_grad_batches)
        done = per_epoch * trainer.current_epoch
        self._task = self._bar.add_task("training", total=total, completed=done, scores="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance by one batch."""
        if self._bar is not None and self._task is not None:
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._bar.update(self._task, advance=1, description=epoch)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the epoch's loss and scores."""
        scores = "  ".join(
            f"{name.replace('train/', '')} {float(trainer.callback_metrics[name]):.3f}"
            for name in ("train/loss", self._score)
            if name in trainer.callback_metrics
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, scores=scores)
        elif self._enabled:
            done, total = trainer.current_epoch + 1, trainer.max_epochs or 1
            elapsed = time.monotonic() - self._started
            print(f"epoch {done}/{total}  {scores}  {elapsed:.0f} s", file=sys.stderr, flush=True)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message that follows stands on a line of its own."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar whatever ended the run."""
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """What the module prints, above the bar."""
        text = " ".join(str(arg) for arg in args)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)
