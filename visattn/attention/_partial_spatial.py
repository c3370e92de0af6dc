"""The training step of PAT_sp as one function with its own gradient, for the speed of it.

Composed of single operations, half of the time goes into joining slices, adding gradients up, and buffers that live for
one operation. Here both halves of the output, and of the gradient, are written where they belong.

Legend: N positions of the whole batch, C channels, c of the first half, e of the second.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C) of `x` (N, C), in two passes."""
    mean = x.mean(dim=0)
    return mean, torch.linalg.vector_norm(x - mean, dim=0).square_().div_(x.shape[0])


def factors(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm as x * scale + shift, and 1 / sqrt(variance + eps); each (C)."""
    root = torch.rsqrt(variance + eps)
    scale = weight * root
    return scale, bias - mean * scale, root


def norm_gradients(
    grad_scale: Tensor, grad_shift: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, root: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients of scale and shift: that of the norm's weight, and the terms of dL/dx = slope * x + offset.

    Its bias has the gradient of shift.
    """
    total = grad_scale - grad_shift * mean
    grad_variance = total * weight * root.pow(3) * -0.5
    slope = grad_variance * (2 / count)
    return total * root, slope, -grad_shift * scale / count - slope * mean


class SpatialStep(torch.autograd.Function):
    """Gate, norm and convolution of PAT_sp in training, of floats of 32 bits or more.

    forward(x (N, C), attention (c), norm1 weight and bias (c), kernel (e, e), norm2 weight and bias (e), eps1, eps2)
    returns the output (N, C) and, without gradient, mean and variance of both norms.
    """

    @staticmethod
    def forward(
        x: Tensor,
        attention: Tensor,
        weight1: Tensor,
        bias1: Tensor,
        kernel: Tensor,
        weight2: Tensor,
        bias2: Tensor,
        eps1: float,
        eps2: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The output, the moments of both norms, and the gate (N)."""
        width = attention.shape[0]
        left, right = x[:, :width], x[:, width:]
        out = torch.empty_like(x)
        gate = torch.nn.functional.hardsigmoid(torch.mv(left, attention))
        first, second = out[:, :width], out[:, width:]
        torch.mul(left, gate[:, None], out=first)
        mean1, variance1 = statistics(first)
        scale, shift, _ = factors(weight1, bias1, mean1, variance1, eps1)
        torch.addcmul(shift, first, scale, out=first)
        mean2, variance2 = statistics(right)
        scale, shift, _ = factors(weight2, bias2, mean2, variance2, eps2)
        torch.addmm(torch.mv(kernel, shift), right, (kernel * scale).t(), out=second)
        return out, mean1, variance1, mean2, variance2, gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs, the moments and the gate."""
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:7], *output[1:])
        ctx.eps = inputs[7:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the first seven inputs."""
        x, attention, weight1, bias1, kernel, weight2, bias2, mean1, variance1, mean2, variance2, gate = (
            ctx.saved_tensors
        )
        grad, count, width = grads[0], x.shape[0], attention.shape[0]
        left, right, grad1, grad2 = x[:, :width], x[:, width:], grad[:, :width], grad[:, width:]
        out = torch.empty_like(x)

        scale, shift, root = factors(weight2, bias2, mean2, variance2, ctx.eps[1])
        grad_bias = grad2.sum(dim=0)  # of kernel @ shift
        grad_folded = torch.mm(grad2.t(), right)  # of kernel * scale, (e, e)
        grad_kernel = torch.addr(grad_folded * scale, grad_bias, shift)
        grad_shift2 = torch.mv(kernel.t(), grad_bias)
        grad_scale = (grad_folded * kernel).sum(dim=0)
        grad_weight2, slope, offset = norm_gradients(grad_scale, grad_shift2, weight2, mean2, scale, root, count)
        second = out[:, width:]
        torch.addcmul(offset, right, slope, out=second)
        second.addmm_(grad2, kernel * scale)

        gated = left * gate[:, None]
        scale, _, root = factors(weight1, bias1, mean1, variance1, ctx.eps[0])
        grad_shift1, grad_scale = grad1.sum(dim=0), (grad1 * gated).sum(dim=0)
        grad_weight1, slope, offset = norm_gradients(grad_scale, grad_shift1, weight1, mean1, scale, root, count)
        grad_gated = gated.mul_(slope).add_(offset).addcmul_(grad1, scale)
        open_ = ((gate > 0) & (gate < 1)).to(x.dtype) / 6  # slope of the hard sigmoid
        first = out[:, :width]
        torch.mul(grad_gated, gate[:, None], out=first)
        grad_gate = grad_gated.mul_(left).sum(dim=1).mul_(open_)
        first.addr_(grad_gate, attention)
        grad_attention = torch.mv(left.t(), grad_gate)
        norm1, norm2 = (grad_weight1, grad_shift1), (grad_weight2, grad_shift2)
        return out, grad_attention, *norm1, grad_kernel, *norm2, None, None
