"""The voxel size that a set of volumes is best brought to, as nnU-Net has it (Isensee et al., Nature Methods 2021)."""

from collections.abc import Sequence

import numpy as np

ANISOTROPIC = 3.0
"""From this ratio of the coarsest axis to the next on, its spacing is not the median's."""


def median_spacing(spacings: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The median along each axis; along one more than 3 times as coarse as the others, the 10th percentile.

    Few cases have slices as thin as the 10th percentile; but at the median of thick slices half of them would lose
    what they have.
    """
    values = np.asarray(spacings, np.float64)
    target = np.median(values, axis=0)
    worst = int(target.argmax())
    others = np.delete(target, worst)
    if target[worst] > ANISOTROPIC * others.max():
        target[worst] = max(float(np.percentile(values[:, worst], 10)), float(others.max()))
    x, y, z = (round(float(mm), 6) for mm in target)
    return x, y, z
