"""Checks of arguments and inputs that several blocks share: every message says what would be valid."""

from collections.abc import Sequence

from torch import Tensor


def positive(name: str, value: int) -> int:
    """`value`, an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def probability(name: str, value: float) -> float:
    """`value`, in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def choice(name: str, value: str, valid: Sequence[str]) -> str:
    """`value`, one of `valid`."""
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {value!r}")
    return value


def rank_of(name: str, rank: int, supported: Sequence[int]) -> int:
    """`rank`, the number of spatial axes, one of `supported`."""
    if isinstance(rank, bool) or rank not in supported:
        raise ValueError(f"{name} supports rank {', '.join(map(str, supported))} (spatial axes), got {rank!r}")
    return rank


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`value` as one positive integer for each of `rank` axes; a single integer serves all of them."""
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(values) != rank:
        raise ValueError(f"{name} must be one integer or {rank} of them, one per spatial axis, got {value!r}")
    return tuple(positive(name, each) for each in values)


def heads_of(dim: int, num_heads: int | None) -> int:
    """`num_heads`, a divisor of `dim`; None gives the fewest heads of at most 32 channels."""
    positive("dim", dim)
    if num_heads is None:
        return next(heads for heads in range(1, dim + 1) if dim % heads == 0 and dim // heads <= 32)
    if dim % positive("num_heads", num_heads):
        valid = [heads for heads in range(1, dim + 1) if dim % heads == 0]
        raise ValueError(f"num_heads must divide dim={dim}: one of {valid}, got {num_heads}")
    return num_heads


def channels_last(name: str, x: Tensor, dim: int, ranks: Sequence[int]) -> None:
    """Refuse an `x` that is not (B, *S, dim) with one of `ranks` spatial axes, none of them empty."""
    if x.ndim - 2 not in ranks or x.shape[-1] != dim:
        axes = " or ".join(map(str, ranks))
        raise ValueError(f"{name} takes (B, *S, {dim}) with {axes} spatial axes, channels last, got {tuple(x.shape)}")
    if any(size == 0 for size in x.shape[1:-1]):
        raise ValueError(f"{name} takes spatial axes of size 1 or more, got {tuple(x.shape)}")
