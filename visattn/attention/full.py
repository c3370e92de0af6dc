"""Full attention: every position attends to every other, or to fewer keys that stand for them.

Papers: Dosovitskiy et al., "An Image is Worth 16x16 Words", arXiv 2010.11929 (`vit`); Wang et al., "Pyramid Vision
Transformer", arXiv 2102.12122, section 3.3 (`pvt`); Li et al., "Next-ViT", arXiv 2207.05501, section 3.3, E-MHSA, which
MedViT uses (`e_mhsa`): softmax(q k^T / sqrt(d)) v with k, v from a map reduced by `sr_ratio` per axis.
Official code: https://github.com/whai362/PVT (Apache-2.0), https://github.com/bytedance/Next-ViT (Apache-2.0) and
https://github.com/Omid-Nejati/MedViTV2, revision 8d54f66 (MIT), for the state-dict names and the order of operations.

Deviations:
- A map too small to reduce, where the official code fails: `pvt` zero-pads an axis shorter than `sr_ratio` up to it;
  `e_mhsa` averages all positions where they are fewer than a run.
- Other ranks: `pvt` convolves along all axes; `e_mhsa` averages runs of sr_ratio ** rank positions.
- `e_mhsa` in training with a single value per channel uses its norm's running statistics, where torch's layer raises.

Legend: B batch, *S spatial axes with N positions, M keys, C channels, H heads, D head dim.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visattn.attention import _checks as check
from visattn.attention._backend import scaled_dot_product
from visattn.attention._norm import batch_norm
from visattn.attention._precision import exact_logits
from visattn.attention._windows import flat_index, short_of

Variant = Literal["vit", "pvt", "e_mhsa"]
CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class FullAttention(nn.Module):
    """Multi-head self-attention over the whole map, by PyTorch's fused kernel.

    Border policy: none without reduction. With it, positions beyond the last whole block (`pvt`) or run (`e_mhsa`) are
    not keys, as in the official code; see the file's head for maps that are smaller than one.

    The state dict has the official keys. `vit`: qkv, proj. `pvt`: q, kv, proj, and sr, norm with a reduction. `e_mhsa`:
    q, k, v, proj, and norm with a reduction.

    Args:
        dim: Channels C.
        num_heads: A divisor of `dim`; None: heads of at most 32 channels.
        variant: `vit`: no reduction. `pvt`: keys and values from a strided convolution and a LayerNorm. `e_mhsa`: from
            averages over runs of the flattened map and a BatchNorm.
        sr_ratio: Reduction per axis; 1 leaves it out.
        rank: Number of spatial axes; only the convolution of `pvt` depends on it.
        qkv_bias: Whether queries, keys and values have a bias.
        qk_scale: Factor of the scores; None: D ** -0.5.
        attn_drop: Dropout of attention weights.
        proj_drop: Dropout after the last projection.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        variant: Variant = "vit",
        sr_ratio: int = 1,
        rank: int = 2,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = check.heads_of(dim, num_heads)
        self.dim = dim
        self.variant = check.choice("variant", variant, ("vit", "pvt", "e_mhsa"))
        self.rank = check.rank_of("FullAttention", rank, self.supported_ranks)
        self.sr_ratio = check.positive("sr_ratio", sr_ratio)
        if variant == "vit" and sr_ratio > 1:
            raise ValueError(f"variant='vit' has no reduction: use 'pvt' or 'e_mhsa' with sr_ratio={sr_ratio}")
        self.scale = (dim // self.num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop = check.probability("attn_drop", attn_drop)
        if variant == "vit":
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=qkv_bias)
        if variant == "pvt":
            self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
            if sr_ratio > 1:
                self.sr = CONVOLUTION[rank](dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
                self.norm: nn.Module = nn.LayerNorm(dim)
        if variant == "e_mhsa":
            self.k = nn.Linear(dim, dim, bias=qkv_bias)
            self.v = nn.Linear(dim, dim, bias=qkv_bias)
            if sr_ratio > 1:
                self.norm = nn.BatchNorm1d(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(check.probability("proj_drop", proj_drop))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initial values: linear weights from a truncated normal distribution of std 0.02, biases 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: (B, *S, C), any size of at least 1 per axis.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: If `x` has another shape.
        """
        query, key, value = self._project(x)
        drop = self.attn_drop if self.training else 0.0
        out = scaled_dot_product(query, key, value, None, self.scale, drop)  # (B, H, N, D)
        projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))
        return projected

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the position at index `query` attends to every position of `x`: (B, H, *S), summing to 1.

        Raises:
            ValueError: With a reduction, where a key stands for many positions, or if `query` is not in the map.
        """
        if self.sr_ratio > 1:
            raise ValueError("attention_map needs sr_ratio=1: a reduced key has no single position")
        q, k, _ = self._project(x)
        sizes = x.shape[1:-1]
        place = flat_index(query, sizes)
        scores = exact_logits(q[:, :, place, None], k, self.scale)  # (B, H, 1, N)
        return scores.softmax(-1).reshape(x.shape[0], self.num_heads, *sizes)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query (B, H, N, D), key and value (B, H, M, D)."""
        ranks = (self.rank,) if self.variant == "pvt" and self.sr_ratio > 1 else self.supported_ranks
        check.channels_last("FullAttention", x, self.dim, ranks)
        tokens = x.flatten(1, -2)
        if self.variant == "vit":
            query, key, value = self.qkv(tokens).chunk(3, -1)
        else:
            query, fewer = self.q(tokens), tokens if self.sr_ratio == 1 else self._reduce(x)
            key, value = (self.k(fewer), self.v(fewer)) if self.variant == "e_mhsa" else self.kv(fewer).chunk(2, -1)
        return self._heads(query), self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, D)."""
        return torch.unflatten(x, -1, (self.num_heads, self.dim // self.num_heads)).transpose(1, 2)

    def _reduce(self, x: Tensor) -> Tensor:
        """(B, *S, C) -> (B, M, C)."""
        if self.variant == "pvt":
            short = [short_of(size, self.sr_ratio) for size in x.shape[1:-1]]
            maps = F.pad(x.movedim(-1, 1), [each for gap in reversed(short) for each in (0, gap)])
            normed: Tensor = self.norm(self.sr(maps).flatten(2).mT)
            return normed
        tokens = x.flatten(1, -2)
        run = min(self.sr_ratio ** (x.dim() - 2), tokens.shape[1])
        whole = tokens.shape[1] // run * run
        means = torch.unflatten(tokens[:, :whole], 1, (whole // run, run)).mean(2)
        assert isinstance(self.norm, nn.BatchNorm1d)
        return batch_norm(self.norm, means)

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, variant={self.variant!r}, sr_ratio={self.sr_ratio}, "
            f"rank={self.rank}, attn_drop={self.attn_drop}"
        )
