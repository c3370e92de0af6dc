"""The Lightning module that trains, validates and tests a segmentation network."""

from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from visattn.base_task import TrainingTask
from visattn.checkpoint import Checkpoint
from visattn.errors import UserError
from visattn.labels import Labels
from visattn.losses import build_loss
from visattn.members import parse_checkpoint
from visattn.metrics import SegmentationMetrics, Suite
from visattn.networks import check_network, create_model, network_rank
from visattn.postprocessing import PostProcessing, check_postprocessing
from visattn.scoring import score_images, score_volumes


class SegmentationTask(TrainingTask):
    """Trains a segmentation network and scores it at each image's own size.

    The network gets its input channels and classes from the data module's labels, so one recipe block serves any label
    map. Validation computes Dice and IoU on exactly what `visattn predict` would write; `suite` widens that to every
    metric (used by `validate`, `test` and at the end of `fit`).

    Args:
        network: Arguments of `visattn.create_model`: `name`, then e.g. `backbone` and `pretrained` (true, false, or the
            path of a weights file).
        loss: `name` and its options, e.g. `{name: structure, pixel_weighted_bce: true}`.
        optimizer: `name` (adamw, adam, sgd), `lr`, `weight_decay` and the optimiser's own arguments.
        schedule: `name` (cosine, poly, step, constant), `warmup_epochs`, `cooldown_epochs`, the curve's own arguments;
            null: constant.
        init_from: A visattn checkpoint whose weights the network starts from. Entries with another name or shape
            (another head, other input channels) are reported and left as initialised.
        freeze: Shell patterns of parameter names that do not train, e.g. `["backbone.*"]`.
        backbone_lr_factor: Learning rate of parameters under `backbone.` as a share of `lr`.
        ema: Share that an exponential moving average of the weights keeps at each optimiser step, e.g. 0.999. The
            average is what is validated, saved as the network and used by `predict`; the raw weights ride along in
            the checkpoint for continuing. null: no average.
        compile: Speed the network up with `torch.compile`; checkpoints stay as they are.
        postprocess: What is done to a mask before it is scored or written: names (keep_largest, remove_small,
            fill_holes), or mappings with a name and its arguments, as `{name: remove_small, ml: 0.1}`.
    """

    kind: ClassVar[str] = "segmentation"
    scores: ClassVar[tuple[str, ...]] = ("val/dice", "val/iou")

    def __init__(
        self,
        network: dict[str, Any],
        loss: dict[str, Any],
        optimizer: dict[str, Any],
        schedule: dict[str, Any] | None = None,
        init_from: str | None = None,
        freeze: list[str] | None = None,
        backbone_lr_factor: float = 1.0,
        ema: float | None = None,
        compile: bool = False,  # noqa: A002 (the recipe's key; the built-in is not needed here)
        postprocess: list[dict[str, Any] | str] | None = None,
    ) -> None:
        check_network(network)
        check_postprocessing(postprocess)
        super().__init__(
            network=network,
            loss=loss,
            optimizer=optimizer,
            schedule=schedule,
            init_from=init_from,
            freeze=freeze,
            backbone_lr_factor=backbone_lr_factor,
            ema=ema,
            compile=compile,
        )
        self.suite: Suite = "headline"
        self._postprocess = postprocess
        self.postprocessing: PostProcessing | None = None
        self.masks: Path | None = None  # where the masks of a full scoring are written, set by results

    @property
    def labels(self) -> Labels:
        """The label map of the data module."""
        return cast(Labels, self.data.labels)

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Names of the labels, and the regions. The values in the files may differ (0 and 1, 0 and 255)."""
        return self.labels.names, self.labels.regions

    def meaning_of(self, checkpoint: Checkpoint) -> tuple[Any, ...]:
        """The same of a checkpoint.

        Raises:
            UserError: It is of another task, or damaged.
        """
        labels = parse_checkpoint(checkpoint)[0]
        return labels.names, labels.regions

    def network_arguments(self) -> dict[str, Any]:
        """Arguments of `create_model` that rebuild the network without downloading anything."""
        return {
            **self.config["network"],
            "pretrained": False,
            "in_channels": self.data.preprocessing.in_channels,
            "classes": self.labels.channels,
            "activation": self.labels.activation,
        }

    def build(self, pretrained: bool | str) -> nn.Module:
        """The network, the loss and the metrics, from the recipe and the data module's labels."""
        self._check_rank()
        rank = self.data.preprocessing.rank
        self.postprocessing = PostProcessing.from_config(self._postprocess, self.labels, rank)
        self.steps = self.postprocessing.to_config()
        self.loss = build_loss(self.config["loss"], self.labels)
        network = create_model(**{**self.network_arguments(), "pretrained": pretrained})
        names = getattr(network, "output_names", ("logits",))
        weights = self.config["loss"].get("deep_supervision")
        if isinstance(weights, list) and len(weights) != len(names):
            raise UserError(
                f"model.loss.deep_supervision: has {len(weights)} weights for the {len(names)} maps of the network: "
                f"{', '.join(names)}"
            )
        self.validation_metrics = SegmentationMetrics(self.labels)
        return network

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Loss at the network's size, metrics at each image's own size."""
        loss = self._evaluate(batch)
        if self.suite == "headline":
            self.log("val/loss", loss, batch_size=len(batch["case"]), sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """As validation, for the test cases."""
        self._evaluate(batch)

    def _evaluate(self, batch: dict[str, Any]) -> Tensor:
        assert self.validation_metrics is not None
        volumes = self.data.preprocessing.rank == 3
        if volumes:
            loss, outcomes = score_volumes(
                self, self.loss, batch, self.labels, self.device, self.data.window, self.data.batch_size,
                self.postprocessing,
            )  # fmt: skip
        else:
            loss, outcomes = score_images(self, self.loss, batch, self.labels, self.device, self.postprocessing)
        suite: Suite = "volume" if volumes and self.suite == "full" else self.suite
        for one in outcomes:
            self.validation_metrics.update(
                one.case, one.predicted, one.truth, one.probability, suite=suite, group=one.group, **one.units
            )
            if self.masks is not None:  # each process its own cases; what was scored is what is written
                one.write(self.masks, self.labels)
        return loss

    def _check_rank(self) -> None:
        """Refuse a network for images where the data are volumes, and the other way round."""
        wanted, given = self.data.preprocessing.rank, network_rank(self.config["network"])
        if wanted != given:
            name, kinds = self.config["network"]["name"], {2: "images", 3: "volumes"}
            raise UserError(
                f"model.network: '{name}' takes "
                f"{kinds[given]} ({given} axes), the data are {kinds[wanted]} ({wanted} axes).\n"
                f"Take a network for {kinds[wanted]} (visattn models), or data of {kinds[given]}."
            )

    def on_validation_epoch_start(self) -> None:
        """Forget the cases of the epoch before."""
        assert self.validation_metrics is not None
        self.validation_metrics.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log the means over cases; `val/dice` is what `best.ckpt` is chosen by."""
        assert self.validation_metrics is not None
        if self.suite != "headline":
            return
        means = self.validation_metrics.compute()
        for name in ("dice", "iou"):
            self.log(f"val/{name}", means[f"mean/{name}"], prog_bar=True, sync_dist=True)  # equal everywhere
