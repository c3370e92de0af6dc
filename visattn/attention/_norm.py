"""Batch normalisation of channels-last tensors, from moments that the block already has.

torch's batch norm is made for dense channels-first memory: the gradient of a slice of channels-last features takes its
slowest path. Written as moments plus one multiply-add per element it needs few passes whatever the strides, and where a
block computes the moments of its features anyway, no further pass at all.

The modules stay torch's own BatchNorm layers: their parameters, buffers, names and training state are used as they are.
One thing differs: with a single value per channel, whose variance means nothing, they raise in training, and here the
running statistics are used and left alone.

Legend: B batch, *S spatial axes, N positions, C channels, G groups of values that share their moments.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Moments(torch.autograd.Function):
    """Mean and biased variance over the positions of (G, N, C), each (G, C), in float32 at least."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, in two passes, so that a large mean costs no digits."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(dim=1)
        # The norm squares and sums in one pass; torch's own variance is several times slower along this axis.
        variance = torch.linalg.vector_norm(x - mean[:, None], dim=1).square() / x.shape[1]
        return mean, variance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the gradient needs: the values, and their mean."""
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        """(dL/dmean + 2 (x - mean) dL/dvariance) / N, as one multiply-add per element."""
        x, mean = ctx.saved_tensors
        slope = grad_variance * (2 / x.shape[1])
        offset = grad_mean / x.shape[1] - slope * mean
        return torch.addcmul(offset[:, None], x.to(mean.dtype), slope[:, None]).to(x.dtype)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of `x` (G, N, C) over N, each (G, C), in float32 at least."""
    if torch.is_grad_enabled() and x.requires_grad:
        mean, variance = Moments.apply(x)
        return mean, variance
    return Moments.forward(x)


def uses_batch(norm: _BatchNorm, count: int) -> bool:
    """Whether `norm` takes its statistics from a batch of `count` values per channel, rather than the running ones."""
    return norm.training and count > 1


def scale_and_shift(
    norm: _BatchNorm, statistics: tuple[Tensor, Tensor] | None, count: int = 0
) -> tuple[Tensor, Tensor]:
    """The factors a and b (C) of `norm`, as in x * a + b.

    Args:
        norm: Any of torch's BatchNorm layers with affine parameters and running statistics.
        statistics: Mean and biased variance of the batch, each (C), which also update the running ones; None takes the
            running ones.
        count: Values per channel that `statistics` were taken from.
    """
    if statistics is None:
        mean, variance = norm.running_mean, norm.running_var
    else:
        mean, variance = statistics
        track(norm, mean, variance, count)
    assert mean is not None
    assert variance is not None
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale


@torch.no_grad()
def track(norm: _BatchNorm, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the running statistics as torch does, with the unbiased variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), share)


def batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """`norm` of the last axis of `x` (B, *S, C), in the dtype of `x`."""
    count = x.numel() // x.shape[-1]
    if isinstance(norm, nn.SyncBatchNorm) and uses_batch(norm, count):  # its statistics span processes
        out: Tensor = norm(x.movedim(-1, 1)).movedim(1, -1)
        return out
    statistics = None
    if uses_batch(norm, count):
        if x.is_contiguous() and x.dtype == norm.weight.dtype:
            return _dense_batch_norm(norm, x.reshape(count, x.shape[-1])).reshape(x.shape)
        mean, variance = moments(x.reshape(1, count, x.shape[-1]))
        statistics = mean[0], variance[0]
    scale, shift = scale_and_shift(norm, statistics, count)
    return multiply_add(x, scale, shift)


def _dense_batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """`norm` in training of dense rows `x` (N, C), on which torch's own kernel is several times quicker."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, share, norm.eps)


def multiply_add(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x` * `scale` + `shift` with factors that broadcast, in the dtype of `x`."""
    return torch.addcmul(shift, x.to(shift.dtype), scale).to(x.dtype)
