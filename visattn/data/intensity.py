"""Normalising the values of a volume's channels, safe against NaN, infinities and constant images.

What is not finite takes part in no statistic and becomes 0, the mean. Statistics of `ct` come from the training cases
(Isensee et al., nnU-Net, 2021); all others from the volume itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from visattn.errors import UserError, unknown
from visattn.scratch import release

Method = Literal["zscore", "zscore_masked", "percentile", "ct", "none"]
METHODS: tuple[str, ...] = get_args(Method)

_BINS = 256  # of Otsu's histogram
_CACHED = 2**16  # values that are looked at together; they fit a core's cache
_PART = 2**22  # values after which the memory of those in a file is given back
_MOST_MASKED = 2**24  # voxels that a body is searched in
_MOST = 2_000_000  # voxels that a percentile is taken of; more change it by less than a thousandth


@dataclass(frozen=True)
class Normalise:
    """How one channel is normalised.

    Args:
        name: `zscore`: minus mean, over standard deviation of all voxels. `zscore_masked`: of the voxels of the head or
            body (see `body_mask`). `percentile`: clipped to two percentiles and scaled to 0..1. `ct`: clipped to `low`
            and `high`, minus `mean`, over `std`, all of the training cases' foreground. `none`.
        percentiles: Of `percentile`, and those that `low` and `high` stand for.
        low: Of `ct`.
        high: Of `ct`.
        mean: Of `ct`.
        std: Of `ct`.
    """

    name: Method = "zscore"
    percentiles: tuple[float, float] = (0.5, 99.5)
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: float | None = None

    @classmethod
    def from_config(cls, config: str | Mapping[str, Any], where: str = "data.normalise") -> "Normalise":
        """Read a name, or a mapping with `name` and its arguments.

        Raises:
            UserError: The name or a key is unknown, or a value cannot be.
        """
        given: dict[str, Any] = {"name": config} if isinstance(config, str) else dict(config)
        if given.get("name") not in METHODS:
            raise unknown(f"method at {where}:", str(given.get("name")), METHODS)
        known = list(cls.__dataclass_fields__)
        for key in given:
            if key not in known:
                raise unknown(f"key of {where}", str(key), known)
        if "percentiles" in given:
            given["percentiles"] = tuple(given["percentiles"])
        method = cls(**given)
        low, high = method.percentiles if len(method.percentiles) == 2 else (1.0, 0.0)
        if not 0 <= low < high <= 100:
            raise UserError(f"{where}: percentiles need two rising numbers of 0 to 100, got {given['percentiles']!r}")
        if method.std is not None and not method.std > 0:
            raise UserError(f"{where}: std must be above 0, got {method.std!r}")
        return method

    def to_config(self) -> dict[str, Any]:
        """Plain Python that `from_config` reads back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def complete(self) -> bool:
        """Whether all statistics are there; those of `ct` are found when the training cases are known."""
        return self.name != "ct" or None not in (self.low, self.high, self.mean, self.std)

    def __call__(self, values: Tensor) -> Tensor:
        """Normalise one channel (D, H, W), float32; the input is left alone."""
        result = values.clone(memory_format=torch.contiguous_format)
        self.fit(values).apply(result)
        return result

    def fit(self, values: Tensor) -> "Scale":
        """What is to be done with one channel (D, H, W), float32, found a part at a time."""
        if self.name == "none":
            return Scale()
        if self.name == "ct":
            if self.low is None or self.high is None or self.mean is None or self.std is None:
                raise ValueError("the statistics of 'ct' are not known yet")
            return Scale(self.mean, self.std, self.low, self.high)
        if self.name == "percentile":
            low, high = percentiles(values, self.percentiles)
            return Scale(low, high - low if high > low else math.inf, low, high)
        if self.name == "zscore_masked":
            coarse = _coarse(values)
            inside = _finite_body(coarse)
            if inside.any():
                return Scale(*_moments(coarse.reshape(-1), inside.reshape(-1)))
        return Scale(*_moments(values.reshape(-1), None))


@dataclass(frozen=True)
class Scale:
    """Values clipped, shifted and divided; what is not finite becomes 0.

    Args:
        shift: What is taken off.
        unit: What the rest is divided by.
        low: Values below it become it.
        high: Values above it become it.
    """

    shift: float = 0.0
    unit: float = 1.0
    low: float | None = None
    high: float | None = None

    def apply(self, values: Tensor) -> None:
        """Change any part of the channel, contiguous, in place."""
        for part in _parts(values.view(-1)):
            # One NaN or infinity makes the sum one; so may numbers that are very large.
            strange = None if math.isfinite(float(part.sum())) else ~torch.isfinite(part)
            if self.low is not None:
                part.clamp_(self.low, self.high)
            if (self.shift, self.unit) != (0.0, 1.0):
                part.sub_(self.shift).div_(self.unit)
            if strange is not None:
                part.masked_fill_(strange, 0.0)


def _parts(flat: Tensor) -> Iterator[Tensor]:
    """A few of the values (N,) at a time."""
    for low in range(0, len(flat), _CACHED):
        part = flat[low : low + _CACHED]
        yield part
        if (low + _CACHED) % _PART == 0 or low + _CACHED >= len(flat):
            release(part.numpy())


def _moments(flat: Tensor, inside: Tensor | None) -> tuple[float, float]:
    """Mean and standard deviation of the finite values (N,) `inside`, joined in float64 from those of small parts.

    The deviation is infinite where there is none, so that a constant image becomes 0.
    """
    count, mean, squares = 0, 0.0, 0.0
    chosen = repeat(None) if inside is None else _parts(inside)
    for part, mask in zip(_parts(flat), chosen, strict=False):
        number, own, around = _of_part(part if mask is None else part[mask])
        if number:
            # The joint sum of squares around the joint mean (Chan, Golub and LeVeque, 1979).
            apart, total = own - mean, count + number
            squares += around + apart**2 * count * number / total
            mean += apart * number / total
            count = total
    if not count:
        return 0.0, math.inf
    std = math.sqrt(squares / count)
    # A constant image has no spread, but rounding gives it some.
    return mean, math.inf if std <= 1e-6 * max(abs(mean), 1e-12) else std


def _of_part(values: Tensor) -> tuple[int, float, float]:
    """Number, mean, and sum of squares around it, of the finite values (N,)."""
    if not len(values):
        return 0, 0.0, 0.0
    centre = float(values.mean())
    centred = values - centre
    squares = float(torch.dot(centred, centred))
    if not math.isfinite(squares) and values.dtype != torch.float64:
        return _of_part(values[torch.isfinite(values)].double())  # which also holds the squares of any float32
    rest = float(centred.mean())  # what rounding has left
    return len(values), centre + rest, max(0.0, squares - len(values) * rest**2)


def _coarse(values: Tensor) -> Tensor:
    """Every voxel of (D, H, W), of large volumes every second, third ... along each axis; a copy."""
    step = math.ceil(float(np.cbrt(values.numel() / _MOST_MASKED)))
    result = values.new_empty([-(-n // step) for n in values.shape])
    for plane, into in zip(values[::step], result, strict=True):
        into.copy_(plane[::step, ::step])
        release(plane.numpy())
    return result


def _finite_body(values: Tensor) -> Tensor:
    """The body's voxels (D, H, W), without those that are not finite, which count as the lowest meanwhile."""
    finite = torch.isfinite(values)
    if not finite.any():
        return finite
    mask = body_mask((values if finite.all() else torch.where(finite, values, values[finite].min())).numpy())
    return torch.from_numpy(mask) & finite


def percentiles(values: Tensor, shares: Sequence[float]) -> tuple[float, float]:
    """Two percentiles of all finite values, of an even sample of them where there are very many."""
    flat = values.reshape(-1)
    step = max(1, math.ceil(len(flat) / _MOST))
    taken = [np.zeros(0, np.float32)]
    for number, part in enumerate(_parts(flat)):
        some = part[-number * _CACHED % step :: step].numpy()
        taken.append(some[np.isfinite(some)])
    sample = np.concatenate(taken)
    if not len(sample):
        return 0.0, 0.0
    low, high = np.percentile(sample, list(shares))
    return float(low), float(high)


def otsu(values: NDArray[np.floating[Any]]) -> float:
    """The threshold that best parts a histogram in two (Otsu, IEEE Trans. SMC 1979)."""
    low, high = np.percentile(values, [0, 99.9])
    if not high > low:
        return float(high)
    counts, edges = np.histogram(values, _BINS, (low, high))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    mean_below = np.cumsum(counts * centres) / np.maximum(below, 1)
    mean_above = (np.sum(counts * centres) - np.cumsum(counts * centres)) / np.maximum(above, 1)
    between = below * above * (mean_below - mean_above) ** 2
    return float(edges[int(between.argmax()) + 1])


def body_mask(values: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
    """Head or body in a volume (D, H, W): the largest bright component with its holes filled.

    Zeros inside the body, such as air or a dark ventricle, belong to it; bright noise outside does not.
    """
    labels, count = ndimage.label(values > otsu(values))
    if count == 0:
        return np.zeros(values.shape, bool)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    filled: NDArray[np.bool_] = ndimage.binary_fill_holes(labels == sizes.argmax())
    return filled
