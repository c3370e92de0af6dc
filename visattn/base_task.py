"""What training is in every task: network, optimiser, schedule, average, resumption, checkpoint, stop at NaN.

A task adds what its data mean: the loss, how cases are scored, and what the scores are called.
"""

import copy
import sys
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from visattn.checkpoint import KEY, PREFIX, Checkpoint, checkpoint_metadata, read_checkpoint
from visattn.errors import UserError
from visattn.optimizers import build_optimizer, build_schedule, check_optimizer, check_schedule, freeze, state_bytes
from visattn.runs import is_first_process
from visattn.scoring import THRESHOLD

RAW = "visattn_raw"  # entry of the .ckpt with the weights that training goes on from, where state_dict is their average


class TrainingTask(L.LightningModule):
    """A network that is trained by a recipe. Its arguments are those that every task shares.

    Args:
        network: `name` and arguments of the network.
        loss: `name` and its options.
        optimizer: `name`, `lr`, `weight_decay` and the optimiser's own arguments.
        schedule: `name`, `warmup_epochs`, `cooldown_epochs`, the curve's own arguments; null: constant.
        init_from: A visattn checkpoint whose weights the network starts from.
        freeze: Shell patterns of parameter names that do not train.
        backbone_lr_factor: Learning rate of parameters under `backbone.` as a share of `lr`.
        layer_decay: Learning rate of each layer as a share of that of the layer after it; null: all alike.
        ema: Share that an exponential moving average of the weights keeps at each optimiser step; null: no average.
        compile: Speed the network up with `torch.compile`; checkpoints stay as they are.
    """

    kind: ClassVar[str]
    """What the network does, as the checkpoint calls it."""
    scores: ClassVar[tuple[str, ...]]
    """What validation logs each epoch; `best.ckpt` is chosen by the first, the higher the better."""

    def __init__(
        self,
        *,
        network: dict[str, Any],
        loss: dict[str, Any],
        optimizer: dict[str, Any],
        schedule: dict[str, Any] | None,
        init_from: str | None,
        freeze: list[str] | None,
        backbone_lr_factor: float = 1.0,
        layer_decay: float | None = None,
        ema: float | None,
        compile: bool,  # noqa: A002 (the recipe's key; the built-in is not needed here)
    ) -> None:
        super().__init__()
        check_optimizer(optimizer)
        check_schedule(schedule or {"name": "constant"})
        _try_values(optimizer, schedule, backbone_lr_factor)
        if layer_decay is not None and not 0 < layer_decay <= 1:
            raise UserError(
                f"model.layer_decay: must be above 0 and at most 1, such as 0.75, or null; got {layer_decay}"
            )
        if ema is not None and not 0 < ema < 1:
            raise UserError(f"model.ema: must lie between 0 and 1, such as 0.999, or be null; got {ema}")
        if init_from is not None and not Path(init_from).is_file():
            raise UserError(f"model.init_from: no such file: {init_from}")
        self.config: dict[str, Any] = {
            "network": dict(network),
            "loss": dict(loss),
            "optimizer": dict(optimizer),
            "schedule": dict(schedule) if schedule else None,
        }
        self.init_from = init_from
        self.freeze_patterns = list(freeze or [])
        self.backbone_lr_factor = backbone_lr_factor
        self.layer_decay = layer_decay
        self.ema = ema
        self.compiled = compile
        self.average: WeightAverage | None = None
        self.recipe: dict[str, Any] = {}  # the resolved recipe, set by fit; rides in the checkpoint
        self.recipe_name = ""
        self.data: Any = None  # the data module, set by fit: labels and preprocessing decide the network's ends
        self.network: nn.Module | None = None
        self.loss: Any = None
        self.validation_metrics: Any = None
        self.steps: list[dict[str, Any]] = []  # what is done to masks, as the checkpoint says it

    @property
    @abstractmethod
    def labels(self) -> Any:
        """What the outputs of the network mean, from the data module."""

    @property
    @abstractmethod
    def meaning(self) -> tuple[Any, ...]:
        """Names of the classes, and what else decides what an output means."""

    @abstractmethod
    def meaning_of(self, checkpoint: Checkpoint) -> tuple[Any, ...]:
        """The same of a checkpoint.

        Raises:
            UserError: It is of another task, or damaged.
        """

    @abstractmethod
    def network_arguments(self) -> dict[str, Any]:
        """What rebuilds the network without downloading anything."""

    @abstractmethod
    def build(self, pretrained: bool | str) -> nn.Module:
        """Build the network and set `loss` and `validation_metrics`, from the recipe and the data module."""

    def configure_model(self) -> None:
        """Build network and loss from the recipe and the data module's labels (once)."""
        if self.network is not None:
            return
        pretrained = self.config["network"].get("pretrained", False) if self.init_from is None else False
        self.network = self.build(pretrained)
        if self.init_from is not None:
            _tell(initialise_from(self.network, self.init_from))
        frozen = freeze(self.network, self.freeze_patterns)
        if frozen:
            _tell(f"frozen: {len(frozen)} parameter tensors")
        if self.ema is not None:
            self.average = WeightAverage(self.network, self.ema)
        if self.data.preprocessing.rank == 3:
            for parameter in self.network.parameters():
                if parameter.ndim == 5:  # of convolutions: half the time on matrix units
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        if self.compiled:
            self.network.compile()  # in place: no wrapper, so the names of the weights stay

    def _optimizer(self) -> torch.optim.Optimizer:
        assert self.network is not None
        return build_optimizer(self.config["optimizer"], self.network, self.backbone_lr_factor, self.layer_decay)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The recipe's optimiser with its schedule, advanced every optimiser step."""
        optimizer = self._optimizer()
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("trainer.max_epochs: -1 has no end, which a schedule counts towards; give a number")
        total = int(steps)
        per_epoch = total / max(self.trainer.max_epochs or 1, 1)
        schedule = build_schedule(self.config["schedule"], optimizer, total, per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint will be: weights, their average, and the optimiser's means."""
        assert self.network is not None
        weights = sum(int(value.numel() * value.element_size()) for value in self.network.state_dict().values())
        return weights * (2 if self.ema is not None else 1) + state_bytes(self._optimizer())

    def forward(self, images: Tensor) -> Any:
        """What the network, or while evaluating its average, makes of images (B, C, *S)."""
        assert self.network is not None
        if self.average is not None and not self.training:
            return self.average.network(images)
        return self.network(images)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """Mean loss of one batch; a non-finite loss stops the run naming step and files."""
        images, target = self.prepare(batch)
        loss = cast(Tensor, self.loss(self(images), target))
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} at epoch {self.current_epoch}, step {self.global_step}.\n"
                f"Cases of the batch: {', '.join(batch['case'][:4])}{', ...' if len(batch['case']) > 4 else ''}\n"
                "Lower model.optimizer.lr, set trainer.gradient_clip_val, or use trainer.precision 32-true."
            )
        # Under `mean` as it is, for the mean of the epoch: Lightning divides `loss` by the accumulated batches.
        return {"loss": loss, "mean": loss.detach()}

    def prepare(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images and targets of a training batch, as the network and the loss get them."""
        return batch["image"], batch["target"]

    def on_fit_start(self) -> None:
        """Bring the average to the device of the weights."""
        if self.average is not None:
            self.average.network.to(self.device)

    def average_weights(self) -> None:
        """Move the average towards the weights; called after every optimiser step."""
        if self.average is not None and self.network is not None:
            self.average.update(self.network, self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Everything that `predict` needs rides in the checkpoint, as plain values; its network is the average."""
        checkpoint[KEY] = checkpoint_metadata(
            recipe=copy.deepcopy(self.recipe),
            labels=self.labels.to_config(),
            preprocessing=self.data.preprocessing.to_config(),
            network=self.network_arguments(),
            data={"description": self.data.description, "fingerprint": self.data.fingerprint},
            task=self.kind,
            threshold=THRESHOLD,
            steps=self.steps,
        )
        if self.average is not None:
            weights = checkpoint["state_dict"]
            checkpoint[RAW] = {key: value for key, value in weights.items() if key.startswith(PREFIX)}
            average = {PREFIX + key: value for key, value in self.average.network.state_dict().items()}
            checkpoint["state_dict"] = {**weights, **average}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """To train on, the raw weights and the average; to score, the average alone."""
        if self.trainer.state.fn != TrainerFn.FITTING:
            self.average = None
            return
        weights = checkpoint["state_dict"]
        if self.average is not None:
            own = {key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)}
            self.average.network.load_state_dict(own)
        checkpoint["state_dict"] = {**weights, **checkpoint.get(RAW, {})}


class WeightAverage:
    """An exponential moving average of a network's weights and running statistics. Not a module of the task's.

    Args:
        network: What is averaged; the average starts as a copy.
        decay: Share that the average keeps at each step. The first steps keep less, (1 + step) / (10 + step), so that a
            short training does not end on an average of its beginning.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move towards `network` after optimiser step number `step`, counted from 1."""
        keep = min(self.decay, (1 + step) / (10 + step))
        own = self.network.state_dict()
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                own[key].lerp_(value.to(own[key].dtype), 1 - keep)
            else:  # a count of batches
                own[key].copy_(value)


def _try_values(optimizer: dict[str, Any], schedule: dict[str, Any] | None, backbone_lr_factor: float) -> None:
    """Build optimiser and schedule for one weight, so that a value that torch refuses is told at once."""
    if not 0 <= backbone_lr_factor < float("inf"):
        raise UserError(f"model.backbone_lr_factor: must be a number >= 0, got {backbone_lr_factor}")
    try:
        # zeros: drawing weights would move the generator that the network's own are drawn from
        trial = build_optimizer(optimizer, nn.ParameterList([torch.zeros(1, 1)]))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.optimizer: {str(error).splitlines()[0]}") from error
    try:
        build_schedule({**(schedule or {}), "warmup_epochs": 0}, trial, 1, 1.0)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.schedule: {str(error).splitlines()[0]}") from error


def _tell(text: str) -> None:
    if is_first_process():
        print(text, file=sys.stderr)


def initialise_from(network: nn.Module, path: str) -> str:
    """Copy the weights of the visattn checkpoint at `path` into `network` where name and shape agree.

    Returns:
        What was loaded, skipped and left as initialised, for the user to read.

    Raises:
        UserError: nothing fits.
    """
    given: Mapping[str, Tensor] = read_checkpoint(path).state_dict
    own = network.state_dict()
    loaded = {key: value for key, value in given.items() if key in own and own[key].shape == value.shape}
    if not any(key for key in loaded if own[key].ndim > 1):
        raise UserError(f"model.init_from: no weight of {path} fits this network; is it another architecture?")
    network.load_state_dict({**own, **loaded})
    fresh = [key for key in own if key not in loaded]
    skipped = [key for key in given if key not in loaded]
    lines = [f"init_from {path}: loaded {len(loaded)} of {len(own)} entries"]
    for title, keys in (("re-initialised", fresh), ("skipped", skipped)):
        if keys:
            lines.append(f"  {title} ({len(keys)}): {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}")
    return "\n".join(lines)
