"""Where a softmax needs more digits than the surrounding half precision gives."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for `device`; never for `meta`, whose tensors have shapes and no values."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which products keep the dtype of their operands.

    Under autocast a product of float32 operands is otherwise computed in half precision again, where large logits
    become infinite and their softmax NaN.
    """
    if autocast_enabled(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def exact(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def exact_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The logits scale * query key^T (..., Nq, Nk) of (..., Nq, D) and (..., Nk, D), in float32 at least."""
    with without_autocast(query.device):
        return torch.matmul(exact(query) * scale, exact(key).mT)
