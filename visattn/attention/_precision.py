"""Where a softmax needs more digits than the surrounding half precision gives.

Torch has no autocast for `meta`, whose tensors have shapes and no values. `META_TYPE` stands for it there, so that what
is reckoned from shapes alone takes the same steps; `visattn.shadow` sets it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

META_TYPE: ContextVar[torch.dtype | None] = ContextVar("META_TYPE", default=None)
"""The type that products of `meta` tensors are computed in; None: that of their operands."""


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for `device`."""
    if device.type == "meta":
        return META_TYPE.get() is not None
    return torch.is_autocast_enabled(device.type)


def autocast_type(device: torch.device) -> torch.dtype:
    """The type that autocast, which is on for `device`, computes products in."""
    kind = META_TYPE.get() if device.type == "meta" else None
    return torch.get_autocast_dtype(device.type) if kind is None else kind


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which products keep the dtype of their operands.

    Under autocast a product of float32 operands is otherwise computed in half precision again, where large logits
    become infinite and their softmax NaN.
    """
    if not autocast_enabled(device):
        return nullcontext()
    if device.type == "meta":
        return _meta_type(None)
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _meta_type(kind: torch.dtype | None) -> Iterator[None]:
    token = META_TYPE.set(kind)
    try:
        yield
    finally:
        META_TYPE.reset(token)


def exact(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x if x.dtype.itemsize >= 4 else x.float()


def exact_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The logits scale * query key^T (..., Nq, Nk) of (..., Nq, D) and (..., Nk, D), in float32 at least."""
    with without_autocast(query.device):
        return torch.matmul(exact(query) * scale, exact(key).mT)
