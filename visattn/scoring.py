"""What a network makes of validation and test cases, each on its own pixels or voxels, as `visattn predict` would.

Images come as a prepared batch and go through the network once; volumes come one by one and go through it in windows
(`visattn.volume_inference`). Both give an `Outcome` per case, which metrics and mask files are made of.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from visattn.data import nifti
from visattn.data.geometry import Geometry
from visattn.data.volume_preprocessing import Size3
from visattn.inference import predict_probabilities
from visattn.inference3d import Grid
from visattn.labels import IGNORE, Labels
from visattn.overlay import write_png
from visattn.postprocessing import PostProcessing
from visattn.scored import safe_name
from visattn.volume_inference import Engine

THRESHOLD = 0.5  # of the sigmoid, for binary labels and for regions
OVERLAP = 0.5  # of neighbouring windows, as predict has it by default

Network = Callable[[Tensor], Any]
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Outcome:
    """A case that was scored.

    Args:
        case: Its name.
        group: Its group.
        truth: Class indices (H, W) or (I, J, K), `IGNORE` where nothing counts.
        predicted: Class indices of the same shape.
        probability: (channels, H, W) of an image; None for a volume.
        geometry: Of a volume; None for an image.
    """

    case: str
    group: str
    truth: NDArray[np.uint8]
    predicted: NDArray[np.uint8]
    probability: NDArray[np.float32] | None = None
    geometry: Geometry | None = None

    @property
    def units(self) -> dict[str, Any]:
        """What the metrics of a volume have to know of its voxels, in mm and ml."""
        return {} if self.geometry is None else {"spacing": self.geometry.zooms, "voxel_ml": self.geometry.voxel_ml}

    def write(self, folder: Path, labels: Labels) -> None:
        """Write the predicted mask in the values of the labels, a volume on the grid of its file."""
        path, values = folder / mask_name(self.case, self.truth.ndim), labels.decode(self.predicted)
        if self.geometry is None:
            write_png(path, values)
        else:
            nifti.write(path, values, self.geometry, "labels")


def mask_name(case: str, rank: int) -> str:
    """The name of a predicted mask's file, by the number of axes of the data."""
    return safe_name(case) + (".png" if rank == 2 else ".nii.gz")


def score_images(
    network: Network,
    loss: Loss,
    batch: Mapping[str, Any],
    labels: Labels,
    device: torch.device,
    postprocessing: PostProcessing | None = None,
) -> tuple[Tensor, list[Outcome]]:
    """Score a batch of images.

    Args:
        network: (B, C, h, w) to logits or a tuple of them.
        loss: Of the network's outputs and targets of their size.
        batch: {image (B, C, h, w), target: list of (H, W), case, group}.
        labels: The label map.
        device: Where the network is.
        postprocessing: What is done to the masks.

    Returns:
        The loss at the network's size, and an outcome for each image at its own.
    """
    outputs = network(batch["image"])
    size = batch["image"].shape[-2:]
    targets = torch.cat([resize_indices(target, size) for target in batch["target"]]).to(device)
    value = loss(outputs, targets)
    natives = [target.cpu().numpy() for target in batch["target"]]
    probabilities = predict_probabilities(
        lambda _: outputs, batch["image"], [target.shape for target in natives], labels.activation
    )
    outcomes = []
    for case, group, truth, probability in zip(batch["case"], batch["group"], natives, probabilities, strict=True):
        predicted = labels.from_probabilities(probability, THRESHOLD)
        if postprocessing is not None:
            postprocessing.apply(predicted)
        outcomes.append(Outcome(case, group, truth, predicted, probability))
    return value.detach(), outcomes


@torch.no_grad()
def score_volumes(
    network: Network,
    loss: Loss,
    batch: Mapping[str, Sequence[Any]],
    labels: Labels,
    device: torch.device,
    window: Size3 | None,
    calls: int = 1,
    postprocessing: PostProcessing | None = None,
) -> tuple[Tensor, list[Outcome]]:
    """Score volumes one by one.

    Args:
        network: (B, C, d, h, w) to logits or a tuple of them.
        loss: Of the network's outputs and targets of their size.
        batch: Lists, as `visattn.data.patches.VolumeSet` describes their entries.
        labels: The label map.
        device: Where the network is.
        window: (d, h, w); None: whole volumes.
        calls: Windows in a call at most.
        postprocessing: What is done to the masks.

    Returns:
        The mean loss over all windows, and an outcome for each volume on the voxels of its file.
    """
    # The windows go through the network under autocast where this is called under it.
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    heard = _Heard(network, loss, device)
    engine = Engine(
        [heard], labels, THRESHOLD, window, OVERLAP, batch=calls, device=device, autocast=autocast,
        memory_format=torch.channels_last_3d if autocast is not None else torch.contiguous_format,
    )  # fmt: skip
    outcomes = []
    for case, group, image, target, truth, plan, geometry in zip(
        *(batch[key] for key in ("case", "group", "image", "target", "truth", "plan", "geometry")), strict=True
    ):
        heard.start(engine.grid(plan.size), target)
        predicted = engine.run(image, plan).indices
        if postprocessing is not None:
            postprocessing.apply(predicted, geometry.voxel_ml)
        outcomes.append(Outcome(case, group, np.asarray(truth), predicted, None, geometry))
    return heard.total / max(1, heard.count), outcomes


class _Heard:
    """The network, and the loss of every window that goes through it, in the order in which windows are taken."""

    def __init__(self, network: Network, loss: Loss, device: torch.device) -> None:
        self.network, self.loss, self.device = network, loss, device
        self.total, self.count = torch.zeros((), device=device), 0
        self._windows: Any = iter(())

    def start(self, grid: Grid, target: NDArray[np.uint8]) -> None:
        """Begin with another volume, whose class indices (D, H, W) lie on the network's grid."""
        self._windows = (
            _cut(target, (start, row, column), grid.patch)
            for start in grid.starts[0]
            for row in grid.starts[1]
            for column in grid.starts[2]
        )

    def __call__(self, windows: Tensor) -> Any:
        outputs = self.network(windows)
        # Not before the network, which may run out of memory and is then called again with fewer windows.
        targets = np.stack([next(self._windows) for _ in range(len(windows))])
        value = self.loss(outputs, torch.from_numpy(targets).to(self.device))
        self.total, self.count = self.total + value.detach() * len(windows), self.count + len(windows)
        return outputs


def _cut(target: NDArray[np.uint8], begin: Size3, size: Size3) -> NDArray[np.uint8]:
    """A window of class indices; what lies outside the volume counts for nothing."""
    result = np.full(size, IGNORE, np.uint8)
    spans = [
        (max(start, 0), min(start + length, there))
        for start, length, there in zip(begin, size, target.shape, strict=True)
    ]
    into = tuple(slice(low - start, high - start) for (low, high), start in zip(spans, begin, strict=True))
    result[into] = target[tuple(slice(*span) for span in spans)]
    return result


def resize_indices(target: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Class indices `(H, W)` to `(1, h, w)` by the nearest pixel, so that no class is invented between two others."""
    return F.interpolate(target[None, None].float(), size=tuple(size), mode="nearest-exact")[0].to(torch.uint8)
