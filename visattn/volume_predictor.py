"""A network for volumes as a Python object: `visattn.load("best.ckpt").predict("scan.nii.gz")`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from visattn.checkpoint import Checkpoint
from visattn.data.geometry import Geometry
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.data.volumes import VolumeCase, check_contrast, find_volume_cases, read_case
from visattn.errors import UserError, unknown
from visattn.inference3d import VIEWS, ViewsOf3d
from visattn.members import check_members, find_device, parse_checkpoint, parse_postprocessing, place_networks
from visattn.slice_network import SliceEngine, SliceNetwork, slice_preprocessing
from visattn.volume_inference import Engine, Maps

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "bfloat16")

VolumeLike = Path | str | Sequence[Path | str] | NDArray[Any]
"""A file, one file for each channel, or an array (I, J, K) or (C, I, J, K)."""

WINDOWS = {"cuda": 4, "mps": 1, "cpu": 1}
"""Windows in a call."""


class VolumePredictor:
    """A network for volumes with what it needs to be used; or the networks of several folds.

    Args:
        checkpoints: What `read_checkpoint` or `read_members` returns.
        device: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:1` or `mps`.
        overlap: Share of 0 to below 1 by which neighbouring windows overlap.
        tta: `flips` averages over the eight mirror images.
        precision: What convolutions compute in. `auto`: bfloat16 on a GPU that has it, float32 elsewhere.

    Attributes:
        labels: What the values of a mask mean.
        preprocessing: What a volume goes through, and the names of the channels.
        postprocessing: What is done to a mask.
        recipe: The resolved recipe it was trained with (that of the first fold).
        networks: The modules, in eval mode, on the device; one, or one for each fold.
        engine: What takes prepared volumes through the networks.

    Raises:
        UserError: The checkpoint does not fit this version, the device is not there, or an argument cannot be.
    """

    def __init__(
        self,
        checkpoints: Checkpoint | Sequence[Checkpoint],
        device: str = "auto",
        overlap: float = 0.5,
        tta: ViewsOf3d = "none",
        precision: Precision = "auto",
    ) -> None:
        self.device = find_device(device)
        self.checkpoints = (checkpoints,) if isinstance(checkpoints, Checkpoint) else tuple(checkpoints)
        check_members(self.checkpoints)
        self.labels, preprocessing, threshold = parse_checkpoint(self.checkpoints[0])
        self.postprocessing = parse_postprocessing(self.checkpoints[0])
        images = None
        if not isinstance(preprocessing, VolumePreprocessing):
            images, preprocessing = preprocessing, slice_preprocessing(preprocessing, str(self.checkpoints[0].path))
        if tta not in VIEWS:
            raise unknown("tta", tta, VIEWS)
        if not 0 <= overlap < 1:
            raise UserError(f"--overlap {overlap}: must be a share of 0 to below 1, such as 0.5")
        self.preprocessing = preprocessing
        self.recipe = self.checkpoints[0].recipe
        # Slices are predicted as images are, in float32 unless something else is asked for.
        autocast = computed_in("float32" if images and precision == "auto" else precision, self.device)
        # Convolutions of few bits run on matrix units, which want channels last.
        matrices = autocast is not None and images is None
        layout = torch.channels_last_3d if matrices else torch.contiguous_format
        self.networks = place_networks(self.checkpoints, self.device)
        for network in self.networks:
            network.to(memory_format=layout)
        self.engine = (Engine if images is None else SliceEngine)(
            self.networks if images is None else [SliceNetwork(network, images) for network in self.networks],
            self.labels,
            threshold,
            preprocessing.patch,
            overlap,
            tta,
            WINDOWS[self.device.type],
            self.device,
            autocast,
            layout,
        )

    def predict(self, volume: VolumeLike, geometry: Geometry | None = None) -> NDArray[Any]:
        """The mask of one volume: the recipe's label values (I, J, K), uint8 or uint16, on the voxels of its file.

        Args:
            volume: A file, one file for each channel, or an array (I, J, K) or (C, I, J, K).
            geometry: Of an array. Needed, since orientation and voxel size decide what the network sees.
        """
        return self.labels.decode(self._maps(volume, geometry).indices)

    def predict_proba(self, volume: VolumeLike, geometry: Geometry | None = None) -> NDArray[np.float32]:
        """Probabilities (channels, I, J, K): one channel if binary, else one for each class or region."""
        found = self._maps(volume, geometry, True).probabilities
        assert found is not None
        return found

    def _maps(self, volume: VolumeLike, geometry: Geometry | None, with_probabilities: bool = False) -> Maps:
        if isinstance(volume, np.ndarray):
            array = np.asarray(volume, np.float32)
            array = array[None] if array.ndim == 3 else array
            channels = self.preprocessing.in_channels
            if geometry is None:
                raise UserError("predict: an array needs its geometry: predict(array, geometry); or give the file")
            if array.ndim != 4 or len(array) != channels or array.shape[1:] != geometry.shape:
                raise UserError(
                    f"predict: expected an array of {channels} channels on a grid of {geometry.shape}, got "
                    f"{np.shape(volume)}"
                )
        else:
            case = self._case(volume)
            array, geometry, _ = read_case(case)
            check_contrast(case, array)
        prepared, plan = self.preprocessing.forward(array, geometry)
        maps = self.engine.run(prepared, plan, with_probabilities=with_probabilities)
        self.postprocessing.apply(maps.indices, geometry.voxel_ml)
        return maps

    def _case(self, volume: Path | str | Sequence[Path | str]) -> VolumeCase:
        if not isinstance(volume, Path | str):
            paths = tuple(Path(path) for path in volume)
            return VolumeCase(str(paths[0]), paths, None, str(paths[0]), str(paths[0]))
        cases, problems = find_volume_cases([Path(volume)], self.preprocessing.channels)
        if problems:
            raise UserError(problems[0].message)
        if len(cases) != 1:
            raise UserError(f"{volume}: holds {len(cases)} cases; give one, or use visattn predict")
        return cases[0]

    def __repr__(self) -> str:
        count = len(self.networks)
        name = f"{self.checkpoints[0].network.get('name')}{f' x {count} folds' if count > 1 else ''}"
        return (
            f"VolumePredictor({name}, labels={list(self.labels.names)}, channels={list(self.preprocessing.channels)}, "
            f"patch={self.preprocessing.patch}, {self.device})"
        )


def computed_in(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type that convolutions compute in; None for float32, which is what `auto` means without a GPU.

    Raises:
        UserError: The precision is unknown.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None
