"""Networks without storage, computing as on a GPU: the types of autocast, and attention by a fused kernel.

Tensors on `meta` have shapes and no values, so nothing is computed and nothing is held; but torch has no autocast for
them, and reckons attention by its formula, with every weight of it. Here both go as CUDA takes them:

- Products in 16 bits, whatever sums or exponentiates in float32, the rest in the type of its input or the widest of
  them: the lists of torch's page on automatic mixed precision (docs.pytorch.org/docs/stable/amp.html, "CUDA Op-Specific
  Behavior"). Weights are cast once a step.
- Attention keeps its operands, its result and a number a query, where the fused kernels take such operands: with heads
  that are multiples of 16 bytes wide, or in 16 bits without a mask. Dropout keeps a byte for each value.

Deviation: functions are seen as Python calls them. One that calls others in C++, or a function of `torch.nn.functional`
that is made of several, counts as a whole by its own name.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from visattn.attention._precision import META_TYPE

_ATTENTION = "scaled_dot_product_attention"
_HALF = {
    *("__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "conv1d"),
    *("conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul"),
    *("mm", "multi_dot", "mv", "prelu", _ATTENTION),
}
_FULL = {
    *("__pow__", "__rdiv__", "__rpow__", "__rtruediv__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist"),
    *("cosh", "cosine_similarity", "cross_entropy", "dist", "erfinv", "exp", "expm1", "group_norm", "interpolate"),
    *("kl_div", "l1_loss", "layer_norm", "linalg_vector_norm", "local_response_norm", "log", "log10", "log1p", "log2"),
    *("logsumexp", "mse_loss", "nll_loss", "norm", "normalize", "pow", "reciprocal", "rms_norm", "rsqrt", "sinh"),
    *("smooth_l1_loss", "softplus", "square", "tan"),
}
_FULL_RESULT = {"cumprod", "cumsum", "log_softmax", "prod", "softmax", "softmin", "sum"}  # they read 16 bits as it is
_WIDEST = {"addcdiv", "addcmul", "bilinear", "cross", "dot", "grid_sample", "index_put", "scatter_add", "tensordot"}
_ALIGNED = 16  # bytes that a head's width must be a multiple of
_MASK_ALIGNED = 8  # values that rows of a mask are padded to a multiple of


def on_meta(network: nn.Module) -> nn.Module:
    """A copy of `network` whose tensors have shapes and no storage."""
    tensors = [*network.parameters(), *network.buffers()]
    memo: dict[int, Any] = {id(each): each.detach().to("meta") for each in tensors}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(memo[id(parameter)], parameter.requires_grad)
    return copy.deepcopy(network, memo)


@contextmanager
def as_on_gpu(kind: torch.dtype | None = None) -> Iterator[Callable[[], None]]:
    """A context for the forward and the backward pass of a network on `meta`.

    Args:
        kind: What products are computed in, as by autocast; None: the type of their operands.

    Yields:
        To be called between the two passes, where a step leaves autocast.
    """
    mode = _AsOnGpu()
    token = META_TYPE.set(kind)
    try:
        with mode:
            yield mode.leave
    finally:
        META_TYPE.reset(token)


def backward(loss: Tensor) -> None:
    """`loss.backward()` within `as_on_gpu`.

    Torch takes that for one function and leaves the context while it runs, so that checkpoints would compute again in
    other types than before.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    ones = (torch.ones_like(loss),)
    engine.run_backward((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)


class _AsOnGpu(TorchFunctionMode):
    """Casts what a function is given, as long as `META_TYPE` says so, and calls attention's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}  # a weight and its copy, found by the weight's identity
        self.left = False

    def leave(self) -> None:
        """Ends autocast: copies of weights are dropped, and from here on only checkpoints compute with it."""
        self.copies.clear()
        self.left = True

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind, name, kwargs = META_TYPE.get(), getattr(func, "__name__", ""), dict(kwargs or {})
        # Formulas of gradients run with gradients off; what a checkpoint computes again runs with them on.
        if kind is not None and (torch.is_grad_enabled() or not self.left):
            if name in _HALF:
                args, kwargs = self._cast((args, kwargs), kind)
            elif name in _FULL or name in _WIDEST:
                args, kwargs = self._cast((args, kwargs), torch.float32)
            elif name in _FULL_RESULT and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
        kernel = _KERNELS.get(name, func)
        return kernel(*args, **kwargs)

    def _cast(self, given: Any, kind: torch.dtype) -> Any:
        return tree_map(lambda each: self._one(each, kind) if isinstance(each, Tensor) else each, given)

    def _one(self, x: Tensor, kind: torch.dtype) -> Tensor:
        if not x.is_floating_point() or x.dtype in (kind, torch.float64):
            return x
        if not (x.is_leaf and x.requires_grad and kind is not torch.float32):
            return x.to(kind)
        if id(x) not in self.copies:
            self.copies[id(x)] = (x, x.to(kind))
        return self.copies[id(x)][1]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, keeping what a GPU's kernel keeps for the backward pass."""
    wide = all(each.shape[-1] * each.element_size() % _ALIGNED == 0 for each in (query, value))
    plain = attn_mask is None and query.element_size() == 2 and query.shape[-1] == value.shape[-1]
    if query.dim() != 4 or enable_gqa or query.numel() == 0 or not (wide or plain):
        out: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return out
    if attn_mask is not None:
        columns = key.shape[-2]
        mask = attn_mask.to(query.dtype)
        if columns % _MASK_ALIGNED and mask.shape[-1] == columns:
            mask = F.pad(mask, (0, -columns % _MASK_ALIGNED))[..., :columns]
        attn_mask = mask.expand(*query.shape[:-1], columns)
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    fused: Tensor = kernel(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]
    return fused


def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
    """`torch.nn.functional.dropout`, keeping a byte for each value."""
    if not training or p == 0.0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, True)[0]
    return dropped


_KERNELS: dict[str, Callable[..., Tensor]] = {_ATTENTION: attend, "dropout": drop}
