"""Batch normalisation of channels-last tensors, from moments that the block already has.

torch's batch norm is made for dense channels-first memory: the gradient of a slice of channels-last features takes its
slowest path. Written as moments plus one multiply-add per element it needs few passes whatever the strides, and where a
block computes the moments of its features anyway, no further pass at all.

The modules stay torch's own BatchNorm layers: their parameters, buffers, names and training state are used as they are.
One thing differs: with a single value per channel, whose variance means nothing, they raise in training, and here the
running statistics are used and left alone.

All that is for the CPU. Elsewhere an operator costs its launch, a float32 copy its memory, and torch's own kernels take
16 bits and channels-last memory as they are: there a norm is one call (see `by_kernel`).

Legend: B batch, *S spatial axes, N positions, C channels, G groups of values that share their moments.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visattn.attention._precision import exact
from visattn.attention._windows import certain


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


class Spread(torch.autograd.Function):
    """Mean and standard deviation (of n - 1) over the positions of (G, N, C), each (G, C), in the dtype of the values.

    By torch's kernel; its own gradient takes five passes over the values, this one a single pass.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation; a single position has deviation 0."""
        if certain(x.numel() == 0):  # no image: torch would warn
            return x.new_zeros(x.shape[0], x.shape[2]), x.new_zeros(x.shape[0], x.shape[2])
        deviation, mean = torch.std_mean(x, dim=1, correction=0 if certain(x.shape[1] == 1) else 1)
        return mean, deviation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Keep the values and both results."""
        ctx.save_for_backward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_deviation: Tensor) -> Tensor:
        """dL/dmean / N + (x - mean) dL/ddeviation / deviation / (N - 1); 0 for the latter where values are equal."""
        x, mean, deviation = ctx.saved_tensors
        # A quotient by a small deviation may exceed float16 until it is shared among the positions.
        deviation, share = exact(deviation), 1 / max(x.shape[1] - 1, 1)
        slope = (exact(grad_deviation) * share / deviation).masked_fill_(deviation == 0, 0)
        offset = torch.addcmul(exact(grad_mean) / x.shape[1], slope, exact(mean), value=-1)
        return torch.addcmul(offset.to(x.dtype)[:, None], x, slope.to(x.dtype)[:, None])


def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of `x` (G, N, C) over N, each (G, C), in the dtype of `x`."""
    if torch.is_grad_enabled() and x.requires_grad:
        mean, deviation = Spread.apply(x)
        return mean, deviation
    return Spread.forward(x)


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


def by_kernel(x: Tensor) -> bool:
    """Whether norms of `x` are left to torch's kernels, and nothing is folded into anything: not on the CPU."""
    return x.device.type != "cpu"


def batch_norm(norm: _BatchNorm, x: Tensor) -> Tensor:
    """`norm` of the last axis of `x` (B, *S, C), in the dtype of `x`."""
    count = x.numel() // x.shape[-1]
    if isinstance(norm, nn.SyncBatchNorm) and uses_batch(norm, count):  # its statistics span processes
        out: Tensor = norm(x.movedim(-1, 1)).movedim(1, -1)
        return out
    if by_kernel(x):
        return _kernel_batch_norm(norm, x.movedim(-1, 1), uses_batch(norm, count)).movedim(1, -1)
    statistics = None
    if uses_batch(norm, count):
        if x.is_contiguous() and x.dtype == norm.weight.dtype:
            return _kernel_batch_norm(norm, x.reshape(count, x.shape[-1]), True).reshape(x.shape)
        mean, variance = moments(x.reshape(1, count, x.shape[-1]))
        statistics = mean[0], variance[0]
    scale, shift = scale_and_shift(norm, statistics, count)
    return multiply_add(x, scale, shift)


def _kernel_batch_norm(norm: _BatchNorm, x: Tensor, training: bool) -> Tensor:
    """`norm` of `x` (B, C, *S) by torch's kernel; for dense rows (N, C) in training the best on the CPU too."""
    share = 0.0 if norm.momentum is None else norm.momentum
    if training:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            share = 1.0 / float(norm.num_batches_tracked)
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, share, norm.eps)


def multiply_add(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x` * `scale` + `shift` with factors that broadcast, in the dtype of `x`."""
    return torch.addcmul(shift, x.to(shift.dtype), scale).to(x.dtype)
