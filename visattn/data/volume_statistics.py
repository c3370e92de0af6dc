"""What preprocessing takes from the training cases: their median spacing, and the intensities of their foreground.

Both as nnU-Net has them (Isensee et al., Nature Methods 2021). Only cases of the training fold are looked at.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from visattn.data.geometry import Geometry
from visattn.data.intensity import Normalise
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.data.volumes import VolumeCase, read_case, read_case_label
from visattn.errors import UserError
from visattn.labels import IGNORE, Labels

_SAMPLE = 10_000  # voxels of a case that intensities are taken from, as in nnU-Net


def turned_spacing(geometry: Geometry, orientation: str | None) -> tuple[float, float, float]:
    """Voxel size in mm along the axes of the network's grid."""
    plain = VolumePreprocessing(("any",), (Normalise("none"),), orientation)
    return plain.plan(np.broadcast_to(np.float32(0), (1, *geometry.shape)), geometry).spacing


def foreground_statistics(
    cases: Sequence[VolumeCase], labels: Labels, methods: Sequence[Normalise]
) -> tuple[Normalise, ...]:
    """Fill in the statistics that `ct` needs, of the voxels of any label but the background.

    Raises:
        UserError: No case has foreground.
    """
    samples: list[list[np.ndarray]] = [[] for _ in methods]
    for case in cases:
        array, geometry, _ = read_case(case)
        truth = read_case_label(case, labels, geometry)
        flat = np.flatnonzero((truth > 0) & (truth != IGNORE))
        flat = flat[:: max(1, len(flat) // _SAMPLE)]
        for channel, found in zip(array, samples, strict=True):
            values = channel.ravel()[flat]
            found.append(values[np.isfinite(values)])
    result = []
    for method, found in zip(methods, samples, strict=True):
        if method.complete:
            result.append(method)
            continue
        values = np.concatenate([*found, np.empty(0, np.float32)]).astype(np.float64)
        if not len(values) or not values.std() > 0:
            raise UserError("data.normalise: 'ct' needs training cases with foreground of more than one intensity")
        low, high = np.percentile(values, method.percentiles)
        result.append(
            replace(method, low=float(low), high=float(high), mean=float(values.mean()), std=float(values.std()))
        )
    return tuple(result)
