"""Reverse attention: look where the coarser prediction has not found anything yet.

Paper: Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp Segmentation", MICCAI 2020, arXiv 2006.11392,
equations 2 and 3: R_i = f_i * A_i with A_i = 1 - sigmoid(P(S_{i+1})), where P is up-sampling.
Official code: github.com/DengPingFan/PraNet, revision 95f12bd, lib/PraNet_Res2Net.py (it states no licence; nothing is
copied from it).

Deviations:
- 1 - sigmoid(s) is computed as sigmoid(-s), which is the same number but keeps its digits in half precision.
- The paper has one class. With several, one map still serves all of them, because what is to be found is whatever the
  coarser prediction calls background: with softmax the background's own probability, with independent sigmoids the
  probability left by the most likely channel. Both reduce to the paper's formula for one class: a softmax over
  (0, s) has the background sigmoid(-s), and a single sigmoid leaves 1 - sigmoid(s).

Legend: B batch, *S spatial axes of the features, *T those of the logits, C channels, K classes.
"""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["sigmoid", "softmax"]


def resize_linear(x: Tensor, size: tuple[int, ...] | torch.Size, align_corners: bool = False) -> Tensor:
    """`x` (B, C, *T) at the spatial `size`, by linear interpolation without anti-aliasing; 2-D or 3-D."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(x, size=tuple(size), mode=mode, align_corners=align_corners)


class ReverseAttention(nn.Module):
    """Features weighted by the probability that a coarser prediction left to the background.

    It has no parameters. Border policy: none is needed, as every position is weighted by itself; logits of another size
    are resized linearly (half-pixel centres), which repeats their edge values outwards.

    Args:
        activation: How the logits are read: `sigmoid` for one channel or channels that may overlap, `softmax` for
            classes that exclude each other, the first of them the background. None decides by their number: one channel
            is a sigmoid, several are a softmax.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, activation: Activation | None = None) -> None:
        super().__init__()
        if activation not in ("sigmoid", "softmax", None):
            raise ValueError(f"activation must be 'sigmoid', 'softmax' or None, got {activation!r}")
        self.activation = activation

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        """Weight `x`.

        Args:
            x: Features (B, *S, C).
            logits: Coarser prediction (B, *T, K), of any size, as unbounded logits.

        Returns:
            `x` times the reverse weight, (B, *S, C), in the dtype of `x`.

        Raises:
            ValueError: The rank is not 2 or 3, the two ranks differ, or softmax has a single channel.
        """
        rank = x.ndim - 2
        if rank not in self.supported_ranks or logits.ndim != x.ndim:
            raise ValueError(
                f"reverse attention takes x (B, *S, C) and logits (B, *T, K) with 2 or 3 spatial axes each, "
                f"got {tuple(x.shape)} and {tuple(logits.shape)}"
            )
        return x * self.weight(logits, x.shape[1:-1]).to(x.dtype)

    def weight(self, logits: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
        """The reverse weight A (B, *size, 1), between 0 and 1, of `logits` (B, *T, K)."""
        if logits.shape[1:-1] != torch.Size(size):
            logits = resize_linear(logits.movedim(-1, 1), size).movedim(1, -1)
        classes = logits.shape[-1]
        if self.activation == "sigmoid" or (self.activation is None and classes == 1):
            # The smallest of the 1 - p_k belongs to the largest logit.
            return torch.sigmoid(-(logits if classes == 1 else logits.amax(dim=-1, keepdim=True)))
        if classes == 1:
            raise ValueError("a softmax over one channel is always 1: use activation='sigmoid'")
        return logits.softmax(dim=-1)[..., :1]

    def extra_repr(self) -> str:
        """The setting shown by `repr`."""
        return f"activation={self.activation!r}"
