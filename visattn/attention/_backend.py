"""The one door to attention kernels: the only file that names SDPA or an optional accelerator.

A backend is chosen by an explicit `backend=` argument; nothing here is global state.

- reference: the definition, slow, in any floating type.
- torch: overlapping tiles, pure PyTorch, forward and backward on every device.
- natten: NATTEN's compiled library, only where it really is there: the package alone, as PyPI delivers it, has no
  backward on the CPU and rebuilds its mask at every call.
- auto: natten where it applies, else torch.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BACKENDS = ("auto", "reference", "torch", "natten")


def launch_bound(x: Tensor) -> bool:
    """Whether `x` is computed with eagerly on a GPU, where it takes longer to start an operator than to run most.

    A block may have a way of few operators for that case: fused attention with its bias, one product instead of several
    small ones. A compiler fuses them by itself, and on the CPU the way of few operations is the quicker one. Tensors on
    `meta` go as those on a GPU, see `visattn.shadow`.
    """
    return x.device.type in ("cuda", "meta") and not torch.compiler.is_compiling()


def scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Softmax attention by PyTorch's best kernel.

    Args:
        query: (B, H, Nq, D).
        key: (B, H, Nk, D).
        value: (B, H, Nk, V).
        mask: Additive or boolean, broadcast to (B, H, Nq, Nk), or None.
        scale: Factor of the scores.
        dropout: Probability of dropping an attention weight; pass 0 outside training.

    Returns:
        (B, H, Nq, V).
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)


def scaled_dot_product_lse(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """As `scaled_dot_product`, with the natural log-sum-exp of the scores (B, H, Nq), in float32 at least.

    The fused operator that PyTorch's own attention runs on the CPU returns it, but has no gradient for it.
    """
    kernel = query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and query.numel() > 0
    if kernel and not torch.is_grad_enabled():
        if mask is not None:
            mask = mask.expand(*query.shape[:-1], key.shape[-2])
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = fused(query, key, value, attn_mask=mask, scale=scale)
        return out, lse
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = torch.matmul(query.to(precise) * scale, key.to(precise).transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    out = torch.matmul(torch.softmax(scores, -1), value.to(precise)).to(query.dtype)
    return out, torch.logsumexp(scores, -1)


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Turns the gradient of a softmax over the last axis into that of its scores, in place and in one pass."""
    backward = torch.ops.aten._softmax_backward_data.out
    turned: Tensor = backward(grad, probabilities, -1, grad.dtype, grad_input=grad)
    return turned


def natten_module() -> Any:
    """The natten package if its compiled library can be used, else None."""
    if importlib.util.find_spec("natten") is None:
        return None
    natten = importlib.import_module("natten")
    return natten if getattr(natten, "HAS_LIBNATTEN", False) else None


def resolve(backend: str, query: Tensor, unsupported: str) -> str:
    """The backend that computes a call of neighbourhood attention.

    Args:
        backend: As asked for, one of `BACKENDS`.
        query: One of the tensors.
        unsupported: What natten cannot do of what is asked; empty if it can do all of it.

    Raises:
        ValueError: If there is no such backend, or natten is asked for and cannot do it.
        ImportError: If natten is asked for and it, or its compiled library, is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "natten":
        if unsupported:
            raise ValueError(f"backend='natten' has {unsupported}: use 'torch'")
        if natten_module() is None:
            raise ImportError(
                "backend='natten' needs natten and its compiled library (natten.HAS_LIBNATTEN), which PyPI does not "
                "deliver. Build it where it is used, see https://natten.org/install, or use backend='torch'"
            )
    if backend != "auto":
        return backend
    fits = query.is_cuda and query.dtype != torch.float64 and not unsupported and not torch.compiler.is_compiling()
    return "natten" if fits and natten_module() is not None else "torch"


def natten_attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Neighbourhood attention by natten's na1d, na2d or na3d.

    Args:
        query: (B, *S, H, D).
        key: (B, *S, G, D).
        value: (B, *S, G, V).
        **settings: Natten's own arguments.

    Returns:
        (B, *S, H, V) and the log-sum-exp of the scores (B, *S, H).
    """
    operator = getattr(natten_module(), f"na{query.dim() - 3}d")
    out, lse = operator(query, key, value, return_lse=True, **settings)
    return out, lse
