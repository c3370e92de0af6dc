"""Full attention with a locally enhanced position: a depthwise convolution added to what attention returns.

Papers: the convolution (LePE) is that of Dong et al., "CSWin Transformer", CVPR 2022, arXiv 2107.00652, equation 10;
this block is the one that Zhu et al., "BiFormer", CVPR 2023, arXiv 2303.08810, use in their last stage.
Official code: github.com/rayleizhu/BiFormer, revision 1697bbb (MIT; nothing is copied from it), models/_common.py.

Deviations:
- Rank 3 with a 3-D convolution. Tensors are channels-last in both variants.
- Logits and softmax are computed in float32 under half precision.

Legend: B batch, *S spatial axes with N positions in all, C channels, h heads, d channels of a head.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._backend import scaled_dot_product
from visattn.attention._depthwise import depthwise
from visattn.attention._precision import exact_logits
from visattn.attention._windows import flat_index

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}


def local_enhancement(dim: int, kernel_size: int, rank: int) -> nn.Module | None:
    """The depthwise convolution of `rank` axes that keeps the size; None for kernel size 0, which leaves it out.

    Raises:
        ValueError: `kernel_size` is even, and so would change the size, or negative.
    """
    if kernel_size == 0:
        return None
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"side_dwconv must be odd, or 0 for no convolution, got {kernel_size!r}")
    return CONV[rank](dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)


class LePEAttention(nn.Module):
    """Softmax attention over the whole map plus a depthwise convolution, both before the last projection.

    Border policy: every size is taken as it is; the convolution pads with zeros.

    Args:
        dim: Channels C.
        num_heads: Heads h, a divisor of `dim`.
        variant: What the convolution reads: the block's input in `legacy`, the values in `nchw`. The two are not
            interchangeable. Projections are stored as 1x1 convolutions in `nchw`, as there.
        rank: Number of spatial axes, 2 or 3.
        side_dwconv: Kernel size of the convolution, odd; 0 leaves it out.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        qk_scale: Factor of the logits; None takes d ** -0.5.
        attn_drop: Probability of dropping an attention weight, in training.
        proj_drop: Probability of dropping an output, in training.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        variant: Literal["legacy", "nchw"] = "legacy",
        rank: int = 2,
        side_dwconv: int = 5,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, check.heads_of(dim, num_heads)
        self.variant = check.choice("variant", variant, ("legacy", "nchw"))
        self.rank = check.rank_of("LePEAttention", rank, self.supported_ranks)
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else float(qk_scale)
        self.attn_drop = check.probability("attn_drop", attn_drop)
        self.lepe = local_enhancement(dim, side_dwconv, rank)
        if variant == "legacy":
            self.qkv: nn.Module = nn.Linear(dim, 3 * dim, bias=qkv_bias)
            self.proj: nn.Module = nn.Linear(dim, dim)
        else:
            self.qkv = CONV[rank](dim, 3 * dim, 1, bias=qkv_bias)
            self.proj = CONV[rank](dim, dim, 1)
        self.proj_drop = nn.Dropout(check.probability("proj_drop", proj_drop))

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, *S, C), any size of at least 1 per axis.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: `x` has another shape.
        """
        q, k, v, values = self._project(x)
        drop = self.attn_drop if self.training else 0.0
        out = scaled_dot_product(q, k, v, None, self.scale, drop)
        out = out.transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            out = out + depthwise(self.lepe, x if self.variant == "legacy" else values)
        out = pointwise(self.proj, out)
        return self.proj_drop(out)  # type: ignore[no-any-return]

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` attends to every token of `x` (B, *S, C): (B, h, *S), summing to 1."""
        q, k, _, _ = self._project(x)
        position = flat_index(query, x.shape[1:-1])
        logits = exact_logits(q[:, :, position, None], k, self.scale)  # (B, h, 1, N)
        return logits.softmax(-1).reshape(x.shape[0], self.num_heads, *x.shape[1:-1])

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, h, N, d), and the values as a map (B, *S, C)."""
        check.channels_last("LePEAttention", x, self.dim, (self.rank,))
        qkv = pointwise(self.qkv, x)
        tokens = math.prod(x.shape[1:-1])
        heads = qkv.reshape(x.shape[0], tokens, 3, self.num_heads, self.dim // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v, qkv[..., 2 * self.dim :]

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        kind = f"variant={self.variant!r}, rank={self.rank}"
        return f"{self.dim}, num_heads={self.num_heads}, {kind}, scale={self.scale:.4g}"


def pointwise(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or a convolution of kernel size 1, on a channels-last map (B, *S, C)."""
    weight, bias = module.weight, module.bias
    return F.linear(x, weight.flatten(1), bias)  # type: ignore[arg-type, operator]
