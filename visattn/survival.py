"""Training that can be stopped between any two batches and goes on as if it had not been."""

import signal
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from visattn.signals import Stopped, StopRequest


class StopOnSignal(L.Callback):
    """Saves `last.ckpt` and raises `Stopped` once a signal has come, from any process of a distributed run.

    A step that began is finished, and so is the accumulation of gradients, which no checkpoint holds. A validation that
    began is dropped and done again: nothing has changed since the last training batch. Place it after every callback
    whose state belongs into the checkpoint.

    Args:
        request: Notes the signals.
        path: The checkpoint to write.

    Attributes:
        saved: Whether `last.ckpt` holds where training stopped.
        together: Whether all processes agreed to stop.
    """

    def __init__(self, request: StopRequest, path: Path) -> None:
        self.request = request
        self.path = path
        self.saved = False
        self.together = False
        self._saving = False

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals back from Lightning, which would go on to the end and exit with 0."""
        self.request.install()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise, where a checkpoint is only scored."""
        self.request.install()

    on_test_start = on_validation_start

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a run that had stopped early from training on when it is continued for its report."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.stopping_reason_message is not None:
                trainer.should_stop = trainer.should_stop or callback.stopped_epoch > 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals wait for the end of a step."""
        self.request.install()
        self.request.deferred = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop between two epochs; the one before was saved at its end."""
        if self._asked(trainer):
            self.saved = trainer.global_step > 0
            raise self._stopped()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop before this batch."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._asked(trainer):
            if batch_idx > 0:
                self._save(trainer)
            self.saved = trainer.global_step > 0
            raise self._stopped()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop in a validation between epochs; one between gradients that are being accumulated is finished."""
        if not self.request.deferred:
            return
        batches = trainer.fit_loop.epoch_loop.batch_progress
        stepped = batches.is_last_batch or batches.current.completed % trainer.accumulate_grad_batches == 0
        if stepped and self._asked(trainer):
            self._save(trainer)
            raise self._stopped()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Everything is saved; signals need not wait any longer."""
        self.request.deferred = False
        if self._asked(trainer):
            self.saved = True
            raise self._stopped()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Training has ended one way or another."""
        self.request.deferred = False

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """State where training goes on, since Lightning's counters stand in the middle of a batch here."""
        if not self._saving:
            return
        loops = checkpoint["loops"]["fit_loop"]
        for count in (loops["epoch_loop.batch_progress"][part] for part in ("total", "current")):
            count["ready"] = count["started"] = count["processed"] = count["completed"]
        if trainer.validating:
            progress = loops["epoch_loop.val_loop.batch_progress"]
            progress["is_last_batch"] = False
            for count in (progress["total"], progress["current"]):
                # One batch begun and not finished is what Lightning takes for a validation to be done again.
                count.update(ready=1, started=1, processed=0, completed=0)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin an epoch after one that ended, also with `max_steps`, where Lightning would end it a second time."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.max_steps == -1:
            return
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        if epochs["current"]["ready"] == epochs["current"]["processed"]:
            for count in (epochs["total"], epochs["current"]):
                count["completed"] = count["processed"]
            batches["current"] = dict.fromkeys(batches["current"], 0)
            batches["is_last_batch"] = False

    def _asked(self, trainer: L.Trainer) -> bool:
        asked = self.request.signal is not None
        if trainer.world_size > 1:  # all stop at the same batch, or those that go on wait for ever
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self.together = True
            self.request.signal = self.request.signal or signal.SIGTERM
        return asked

    def _save(self, trainer: L.Trainer) -> None:
        self._saving = True
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self._saving = False
        self.saved = True

    def _stopped(self) -> Stopped:
        return Stopped(self.request.signal or signal.SIGTERM)


class Averaging(L.Callback):
    """Moves the average of the weights after every optimiser step; the task holds and saves it."""

    def __init__(self) -> None:
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from the step that training starts at."""
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update, unless gradients are still being accumulated."""
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            pl_module.average_weights()  # type: ignore[operator]


class EpochMeans(L.Callback):
    """Logs the mean training loss and the learning rate of an epoch, also of one that a stop has cut in two.

    Lightning's own running means are in no checkpoint. The sums are: one row (loss x cases, cases) for each process.
    """

    KEY = "visattn_epoch"

    def __init__(self) -> None:
        self._sums: Any = None  # tensor (2,)
        self._lr = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring restored sums to the device."""
        if self._sums is not None:
            self._sums = self._sums.to(pl_module.device)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the epoch before. Lightning leaves this out where it goes on within an epoch."""
        self._sums = None
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of this batch."""
        loss, cases = outputs["mean"].float(), len(batch["case"])
        row = loss.new_tensor([0.0, cases])
        row[0] = loss * cases
        self._sums = row if self._sums is None else self._sums + row

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the means over all processes."""
        if self._sums is not None:
            total, cases = self._rows(pl_module).sum(0)
            pl_module.log("train/loss", total / cases, sync_dist=True)
        pl_module.log("lr", self._lr, sync_dist=True)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Every process takes part, the first one writes."""
        if trainer.state.fn == TrainerFn.FITTING and self._sums is not None:
            checkpoint[self.KEY] = {"sums": self._rows(pl_module).cpu(), "lr": self._lr}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take this process's row; with another number of processes the first one takes all."""
        state = checkpoint.get(self.KEY)
        if state is None or trainer.state.fn != TrainerFn.FITTING:
            return
        rows, rank = state["sums"], trainer.global_rank
        same = len(rows) == trainer.world_size
        self._sums = rows[rank] if same else rows.sum(0) * (rank == 0)
        self._lr = float(state["lr"])

    def _rows(self, pl_module: L.LightningModule) -> Tensor:
        """The sums of every process (processes, 2)."""
        return cast(Tensor, pl_module.all_gather(self._sums)).reshape(-1, 2)
