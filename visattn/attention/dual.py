"""Dual attention: every position attends to every other, and every channel to every other.

Papers: Fu et al., "Dual Attention Network for Scene Segmentation", CVPR 2019, arXiv 1809.02983, equations 1 to 4; used
in 3-D by Bouget et al., "Meningioma segmentation in T1-weighted MRI leveraging global context and attention
mechanisms", arXiv 2101.07715 (DAUNet).
Official code of DAUNet: github.com/dbouget/mri_brain_tumor_segmentation, revision 7af4e77,
src/Models/UNet/DualAttentionUNet.py (Keras, BSD-2-Clause; nothing is copied from it).

With A the features (N, C):
- position: B, K, D = projections of A to C/8, C/8 and C; out_i = gamma sum_j softmax_j(K_i . B_j) D_j + A_i.
- channel: S = softmax over the last axis of A^T A; out = gamma X + A, with X = A S as coded and X = A S^T in the paper.
  As coded, the sum runs over the axis along which S is not normalised, so a channel receives weights that need not
  sum to 1.

Deviations:
- The official code makes the projections of the position attention anew in every call, so they are neither trained nor
  stored; here they are parameters like any other. `form="code"` has no biases there, as the code, `form="paper"` has.
- Memory of the position attention grows with N, not with its square: the softmax runs inside a fused kernel.
- Energies and softmax are float32 under half precision. (Neither source scales energies, so they are large.)

Legend: B batch, *S spatial axes with N positions in all, C channels.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._backend import scaled_dot_product
from visattn.attention._precision import exact_logits, without_autocast
from visattn.attention._windows import flat_index

Form = Literal["code", "paper"]
FORMS = ("code", "paper")
WIDEST_HEAD = 256  # fused kernels on GPUs go no further


class PositionAttention(nn.Module):
    """DAUNet's PAM: `gamma` times the attention over all positions, plus the input.

    Border policy: none is needed. The parameters do not depend on the rank, so one block takes maps and volumes.
    `gamma` starts at 0, so a new block returns its input.

    Args:
        dim: Channels C.
        form: `code`: projections without bias. `paper`: with bias.
        reduction: Queries and keys have C / reduction channels, at least 1.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, dim: int, *, form: Form = "code", reduction: int = 8) -> None:
        super().__init__()
        self.dim, self.form = check.positive("dim", dim), check.choice("form", form, FORMS)
        self.reduction = check.positive("reduction", reduction)
        width = max(1, dim // reduction)
        self.conv_b = nn.Linear(dim, width, bias=form == "paper")
        self.conv_c = nn.Linear(dim, width, bias=form == "paper")
        self.conv_d = nn.Linear(dim, dim, bias=form == "paper")
        self.gamma = nn.Parameter(torch.zeros(1))
        for layer in (self.conv_b, self.conv_c, self.conv_d):  # Keras's defaults
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions of `x` (B, *S, C); the same shape comes back."""
        check.channels_last("PositionAttention", x, self.dim, self.supported_ranks)
        query, key, value = (layer(x).flatten(1, -2)[:, None] for layer in (self.conv_c, self.conv_b, self.conv_d))
        parts = []
        for part in torch.split(value, WIDEST_HEAD, dim=-1):  # (B, 1, N, up to 256)
            # Fused kernels want one width for all three; zeros add nothing to a product of queries and keys.
            short = part.shape[-1] - query.shape[-1]
            q, k, v = F.pad(query, [0, max(short, 0)]), F.pad(key, [0, max(short, 0)]), F.pad(part, [0, max(-short, 0)])
            parts.append(scaled_dot_product(q, k, v, None, 1.0)[..., : part.shape[-1]])
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return (x + self.gamma * out.reshape(x.shape)).to(x.dtype)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` attends to every token of `x` (B, *S, C): (B, 1, *S), summing to 1."""
        position = flat_index(query, x.shape[1:-1])
        q, k = self.conv_c(x).flatten(1, -2)[:, position], self.conv_b(x).flatten(1, -2)
        weights = exact_logits(q[:, None], k, 1.0).softmax(-1)  # (B, 1, N)
        return weights.reshape(x.shape[0], 1, *x.shape[1:-1])

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}, form={self.form!r}, reduction={self.reduction}"


class ChannelAttention(nn.Module):
    """DAUNet's CAM: `gamma` times the features mixed by the similarity of their channels, plus the input.

    Border policy: none is needed. `gamma` starts at 0, so a new block returns its input.

    Args:
        dim: Channels C.
        form: `code`: X = A S, as the authors' code. `paper`: X = A S^T, so that the weights of a channel sum to 1.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, dim: int, *, form: Form = "code") -> None:
        super().__init__()
        self.dim, self.form = check.positive("dim", dim), check.choice("form", form, FORMS)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of `x` (B, *S, C); the same shape comes back."""
        check.channels_last("ChannelAttention", x, self.dim, self.supported_ranks)
        weights = self.weights(x).to(x.dtype)
        mixed = torch.matmul(x.flatten(1, -2), weights if self.form == "code" else weights.mT)  # (B, N, C)
        return (x + self.gamma * mixed.reshape(x.shape)).to(x.dtype)

    def weights(self, x: Tensor) -> Tensor:
        """The similarities S (B, C, C) of the channels of `x` (B, *S, C); every row sums to 1."""
        with without_autocast(x.device):
            tokens = x.flatten(1, -2).to(torch.promote_types(x.dtype, torch.float32))
            return torch.matmul(tokens.mT, tokens).softmax(-1)

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}, form={self.form!r}"
