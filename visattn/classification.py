"""The Lightning module that trains, validates and tests a classifier."""

from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from visattn.base_task import TrainingTask
from visattn.checkpoint import Checkpoint
from visattn.class_labels import ClassLabels
from visattn.errors import UserError, unknown
from visattn.losses.classification import build_class_loss, check_class_loss, dense_target
from visattn.members import parse_classifier
from visattn.metrics.classification import ClassificationMetrics
from visattn.networks.classifier import check_classifier, classifier_rank, create_classifier

_MIXING = {"mixup": 0.0, "cutmix": 0.0, "prob": 1.0, "switch_prob": 0.5, "mode": "batch"}


class ClassificationTask(TrainingTask):
    """Trains a classifier and scores it as MedMNIST's evaluator does.

    The network gets its input channels and classes from the data module, so one recipe block serves any data.

    Args:
        network: `name` of a model of timm, ours (`va_...`) among them, `pretrained` (true, false, or the path of a
            weights file), and the model's own arguments, e.g. `drop_path_rate`.
        optimizer: `name` (adamw, adam, sgd, or any of timm's), `lr`, `weight_decay` and the optimiser's own arguments.
        loss: `name` (cross_entropy, bce), `label_smoothing`, `class_weights`; null: bce where a case may have several
            labels, else cross_entropy.
        schedule: `name` (cosine, poly, step, constant), `warmup_epochs`, `cooldown_epochs`, the curve's own arguments;
            null: constant.
        mixing: Mixes the images of a training batch in pairs: `mixup` and `cutmix` (their alpha; 0: not at all),
            `prob`, `switch_prob` and `mode` (batch, pair, elem) of `timm.data.Mixup`. null: no mixing.
        layer_decay: Learning rate of each layer as a share of that of the layer after it, e.g. 0.75; null: all alike.
        init_from: A visattn checkpoint whose weights the network starts from. Entries with another name or shape
            (another number of classes) are reported and left as initialised.
        freeze: Shell patterns of parameter names that do not train, e.g. `["stem.*"]`.
        ema: Share that an exponential moving average of the weights keeps at each optimiser step, e.g. 0.9999. The
            average is what is validated and saved as the network. null: no average.
        compile: Speed the network up with `torch.compile`; checkpoints stay as they are.
    """

    kind: ClassVar[str] = "classification"
    scores: ClassVar[tuple[str, ...]] = ("val/auc", "val/acc")

    def __init__(
        self,
        network: dict[str, Any],
        optimizer: dict[str, Any],
        loss: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        mixing: dict[str, Any] | None = None,
        layer_decay: float | None = None,
        init_from: str | None = None,
        freeze: list[str] | None = None,
        ema: float | None = None,
        compile: bool = False,  # noqa: A002 (the recipe's key; the built-in is not needed here)
    ) -> None:
        check_classifier(network)
        if loss is not None:
            check_class_loss(loss)
        super().__init__(
            network=network,
            loss=loss or {},
            optimizer=optimizer,
            schedule=schedule,
            init_from=init_from,
            freeze=freeze,
            layer_decay=layer_decay,
            ema=ema,
            compile=compile,
        )
        self.mixing = _mixing(mixing) if mixing else None
        self.full = False  # whether validation is a scoring, whose epoch is not logged; set by class_results

    @property
    def labels(self) -> ClassLabels:
        """The classes of the data module."""
        return cast(ClassLabels, self.data.labels)

    @property
    def meaning(self) -> tuple[Any, ...]:
        """Names of the classes, and whether a case may have several."""
        return self.labels.names, self.labels.multi_label

    def meaning_of(self, checkpoint: Checkpoint) -> tuple[Any, ...]:
        """The same of a checkpoint.

        Raises:
            UserError: It is of another task, or damaged.
        """
        labels = parse_classifier(checkpoint)[0]
        return labels.names, labels.multi_label

    def network_arguments(self) -> dict[str, Any]:
        """Arguments of `create_classifier` that rebuild the network without downloading anything."""
        return {
            **self.config["network"],
            "pretrained": False,
            "in_channels": self.data.preprocessing.in_channels,
            "classes": self.labels.channels,
        }

    def build(self, pretrained: bool | str) -> nn.Module:
        """The network, the loss and the metrics, from the recipe and the data module's classes."""
        wanted = self.data.preprocessing.rank
        if self.mixing and self.mixing["cutmix"] and wanted == 3:
            raise UserError("model.mixing: cutmix is for images; volumes take mixup alone")
        # Without cases yet where the folds of a recipe are checked before any of them is trained.
        training = len(self.data.cases.get("train", ())) or self.data.batch_size
        if self.mixing and min(self.data.batch_size, training) % 2:
            raise UserError(
                f"model.mixing: mixes the cases of a batch in pairs; data.batch_size must be even and at most the "
                f"number of training cases, got {self.data.batch_size}"
            )
        default = {"name": "bce" if self.labels.multi_label else "cross_entropy"}
        self.loss = build_class_loss(self.config["loss"] or default, self.labels)
        self.validation_metrics = ClassificationMetrics(self.labels)
        network = create_classifier(**{**self.network_arguments(), "pretrained": pretrained})
        given = classifier_rank(network)
        if wanted != given:
            kinds = {2: "images", 3: "volumes"}
            raise UserError(
                f"model.network: '{self.config['network']['name']}' takes {kinds[given]} ({given} axes), the data are "
                f"{kinds[wanted]} ({wanted} axes).\n"
                f"Take a network for {kinds[wanted]}, or data of {kinds[given]}."
            )
        return network

    def prepare(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images and targets of a training batch, mixed as the recipe says."""
        images, target = batch["image"], batch["target"]
        return (images, target) if self.mixing is None else mix(images, target, self.labels.channels, self.mixing)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Loss, and the probabilities of each case."""
        loss = self._evaluate(batch)
        if not self.full:
            self.log("val/loss", loss, batch_size=len(batch["case"]), sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """As validation, for the test cases."""
        self._evaluate(batch)

    def _evaluate(self, batch: dict[str, Any]) -> Tensor:
        logits = self(batch["image"]).float()
        probabilities = logits.softmax(dim=1) if self.labels.activation == "softmax" else logits.sigmoid()
        if not bool(torch.isfinite(probabilities).all()):
            raise UserError(
                f"the network's outputs are not finite for some of {', '.join(batch['case'][:3])}, ...\n"
                "Lower model.optimizer.lr, or use trainer.precision 32-true."
            )
        self.validation_metrics.update(batch["case"], probabilities, batch["target"], batch["group"])
        return cast(Tensor, self.loss(logits, batch["target"])).detach()

    def on_validation_epoch_start(self) -> None:
        """Forget the cases of the epoch before."""
        self.validation_metrics.reset()

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log AUC and accuracy; `val/auc` is what `best.ckpt` is chosen by."""
        if self.full:
            return
        means = self.validation_metrics.compute()
        self.log("val/auc", means["auc"], prog_bar=True, sync_dist=True)  # equal everywhere
        self.log("val/acc", means["accuracy"], prog_bar=True, sync_dist=True)


def mix(images: Tensor, target: Tensor, classes: int, mixing: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mix the cases of a batch in pairs as timm does; draws from torch's generator alone.

    Args:
        images: (B, C, *S), B even; changed in place.
        target: Class indices (B,), or shares (B, K).
        classes: K.
        mixing: A checked `mixing` block.

    Returns:
        Images, and shares of classes (B, K).
    """
    import timm.data.mixup as timm_mixup

    make: Any = timm_mixup.Mixup
    count = len(images)
    mixer = make(
        mixup_alpha=mixing["mixup"], cutmix_alpha=mixing["cutmix"], prob=mixing["prob"],
        switch_prob=mixing["switch_prob"], mode=mixing["mode"], label_smoothing=0.0, num_classes=count,
    )  # fmt: skip
    # timm draws from NumPy's global generator, which no checkpoint holds: it is seeded here, and put back.
    before = np.random.get_state()
    np.random.seed(int(torch.randint(2**31, ()).item()))
    try:
        # The cases themselves as classes: what timm makes of them says how much of which case is in each.
        mixed, shares = mixer(images, torch.arange(count, device=images.device))
    finally:
        np.random.set_state(before)
    dense = dense_target(target, classes)
    return mixed, shares.to(dense) @ dense


def _mixing(config: dict[str, Any]) -> dict[str, Any]:
    """The `mixing` block with every key.

    Raises:
        UserError: A key is unknown, or a value cannot be.
    """
    for key in config:
        if key not in _MIXING:
            raise unknown("key of model.mixing", str(key), _MIXING)
    result = {**_MIXING, **config}
    for key in ("mixup", "cutmix", "prob", "switch_prob"):
        value, most = result[key], 1 if "prob" in key else float("inf")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise UserError(f"model.mixing.{key}: must be a number of at least 0{', at most 1' * (most == 1)}; "
                            f"got {value!r:.60}")  # fmt: skip
    if result["mode"] not in ("batch", "pair", "elem"):
        raise unknown("mode of model.mixing", str(result["mode"]), ("batch", "pair", "elem"))
    if not result["mixup"] and not result["cutmix"]:
        raise UserError("model.mixing: give mixup or cutmix an alpha above 0, as {mixup: 0.8, cutmix: 1.0}")
    return result
