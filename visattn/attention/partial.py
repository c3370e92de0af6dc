"""Partial attention: a convolution for some channels, attention over channels, positions or both for the others.

Paper: Huang et al., "Partial Channel Network: Compute Fewer, Perform Better", arXiv 2502.01303 (PAT_ch, PAT_sp and
PAT_sf); "Partial Convolution Meets Visual Attention", arXiv 2503.03148, describes the same code. PAT_sf's position bias
is iRPE's (Wu et al., ICCV 2021, arXiv 2107.14222): Euclidean, bias mode, on keys.
Official code: github.com/haiduo/PartialNet, revision 679cfc0, models/partialnet.py (no licence file; nothing is copied
from it).

Deviations:
- A map of one position has no standard deviation: officially it is NaN and so is everything after it; here it is 0.
- With one value per channel in training (PAT_ch's inner norm in a batch of one, every norm on a single position)
  torch's batch norm raises; here the running statistics are used, see `_norm.py`. Where the official code works, the
  numbers are the same.
- On the CPU PAT_ch does not run its second norm over the features again: the moments of gated features follow from the
  moments of each image, which the gate needs anyway.
- Rank 3: a 3-D convolution, and distances in three axes. Logits and softmax are float32 under half precision.

Legend: B batch, *S spatial axes with N positions, C channels, c attended channels, h heads, d channels of a head.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._depthwise import FEW
from visattn.attention._norm import (
    batch_norm,
    by_kernel,
    moments,
    multiply_add,
    scale_and_shift,
    spread,
    track,
    uses_batch,
)
from visattn.attention._partial_spatial import SpatialStep
from visattn.attention._precision import autocast_enabled, exact_logits, without_autocast
from visattn.attention._resample import kept
from visattn.attention._windows import certain, flat_index

CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# iRPE's buckets of a distance: one each up to ALPHA, then logarithmic, all beyond about GAMMA in the last one.
ALPHA, BETA, GAMMA = 20, 40, 160


def convolved_channels(dim: int, n_div: int) -> int:
    """How many channels the convolution takes: one in `n_div`."""
    check.positive("n_div", n_div)
    if not 2 <= n_div <= dim:
        raise ValueError(f"n_div must be from 2 to dim={dim}, so that both parts have channels, got {n_div}")
    return dim // n_div


def init_weights(module: nn.Module) -> None:
    """The official start: weights of convolutions and linear layers truncated normal of std 0.02, biases 0."""
    for each in module.modules():
        if isinstance(each, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(each.weight, std=0.02)
            if each.bias is not None:
                nn.init.zeros_(each.bias)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv` of `x` (B, *S, C), channels last."""
    maps = x.movedim(-1, 1)
    if x.dim() == 4 and x.device.type == "cpu" and certain(math.prod(x.shape[1:-1]) <= FEW):
        maps = maps.contiguous()  # on few positions the copy pays
    out: Tensor = conv(maps)
    return out.movedim(1, -1)


class ChannelGate(nn.Module):
    """PAT_ch's gate of each channel, from the mean and standard deviation of all channels (SRM with a full mixing).

    Args:
        dim: Channels c.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cfc1 = nn.Conv2d(dim, dim, (1, 2), bias=False)
        self.bn = nn.BatchNorm2d(dim)

    def forward(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """The gate (B, c), between 0 and 1, of mean and standard deviation (B, c)."""
        # A (1, 2) kernel on a (1, 2) map of (mean, deviation) is a linear layer over both.
        statistics = torch.stack((mean, deviation), dim=-1).flatten(1)
        return F.hardsigmoid(batch_norm(self.bn, F.linear(statistics, self.cfc1.weight.flatten(1))))


class PartialChannelAttention(nn.Module):
    """PAT_ch: the first C / n_div channels are convolved, each of the others is gated and normalised.

    The gate of a channel comes from the mean and standard deviation of all attended channels. Border policy: zeros
    around the convolution; the gate takes every position alike.

    Args:
        dim: Channels C.
        rank: Number of spatial axes.
        n_div: The convolution takes one channel in `n_div`.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, dim: int, *, rank: int = 2, n_div: int = 4) -> None:
        super().__init__()
        self.dim, self.n_div = check.positive("dim", dim), n_div
        self.rank = check.rank_of("PartialChannelAttention", rank, self.supported_ranks)
        self.convolved = convolved_channels(dim, n_div)
        self.partial_conv3 = CONV[rank](self.convolved, self.convolved, 3, padding=1, bias=False)
        self.attn = ChannelGate(dim - self.convolved)
        self.norm = NORM[rank](dim - self.convolved)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, *S, C); the same shape comes back."""
        check.channels_last("PartialChannelAttention", x, self.dim, (self.rank,))
        first, rest = torch.split(x, [self.convolved, self.dim - self.convolved], dim=-1)
        return torch.cat([convolve(self.partial_conv3, first), self._attend(rest)], dim=-1)

    def _attend(self, x: Tensor) -> Tensor:
        """Gate and normalise `x` (B, *S, c)."""
        batch, channels = x.shape[0], x.shape[-1]
        positions = math.prod(x.shape[1:-1])
        each = (batch, *(1,) * self.rank, channels)
        if by_kernel(x):
            gate = self.attn(*spread(x.flatten(1, -2)))
            return batch_norm(self.norm, x * gate.reshape(each).to(x.dtype))
        mean, variance = moments(x.reshape(batch, positions, channels))  # (B, c)
        # The root has no slope at 0, where a constant channel must have slope 0.
        varies = variance > 0
        unbiased = torch.where(varies, variance, 1) * (positions / max(positions - 1, 1))
        kind = self.norm.weight.dtype
        gate = self.attn(mean.to(kind), (unbiased.sqrt() * varies).to(kind)).to(mean.dtype)
        count = batch * positions
        if isinstance(self.norm, nn.SyncBatchNorm) and uses_batch(self.norm, count):
            return batch_norm(self.norm, x * gate.reshape(each).to(x.dtype))
        statistics = None
        if uses_batch(self.norm, count):
            gated = gate * mean
            center = gated.mean(dim=0)
            statistics = center, (gate.square() * variance + (gated - center).square()).mean(dim=0)
        scale, shift = scale_and_shift(self.norm, statistics, count)
        return multiply_add(x, (gate * scale).reshape(each), shift)

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}, rank={self.rank}, n_div={self.n_div}"


class PartialSpatialAttention(nn.Module):
    """PAT_sp: some channels are gated position by position, the others mixed by a 1x1 convolution.

    Border policy: none is needed, no position sees another.

    Args:
        dim: Channels C.
        rank: Number of spatial axes.
        partial: Share of the channels, the last ones, that the convolution takes.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(self, dim: int, *, rank: int = 2, partial: float = 0.5) -> None:
        super().__init__()
        self.dim, self.partial = check.positive("dim", dim), partial
        self.rank = check.rank_of("PartialSpatialAttention", rank, self.supported_ranks)
        self.convolved = int(dim * partial)
        if not 1 <= self.convolved < dim:
            raise ValueError(
                f"partial must leave channels to both parts: int(dim * partial) from 1 to {dim - 1}, got {partial!r} "
                f"with dim={dim}"
            )
        self.conv = CONV[rank](self.convolved, self.convolved, 1, bias=False)
        self.conv_attn = CONV[rank](dim - self.convolved, 1, 1, bias=False)
        self.norm = NORM[rank](dim - self.convolved)
        self.norm2 = NORM[rank](self.convolved)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, *S, C); the same shape comes back."""
        check.channels_last("PartialSpatialAttention", x, self.dim, (self.rank,))
        if self._as_one_step(x):
            return self._step(x)
        first, rest = torch.split(x, [self.dim - self.convolved, self.convolved], dim=-1)
        gate = F.hardsigmoid(F.linear(first, self.conv_attn.weight.flatten(1)))  # (B, *S, 1)
        return torch.cat([batch_norm(self.norm, first * gate), self._convolve(rest)], dim=-1)

    def _as_one_step(self, x: Tensor) -> bool:
        """Whether training takes the fast function: it needs full precision, and statistics of this process alone."""
        return (
            all(uses_batch(norm, x.numel() // self.dim) for norm in (self.norm, self.norm2))
            and not any(isinstance(norm, nn.SyncBatchNorm) for norm in (self.norm, self.norm2))
            and not by_kernel(x)
            and x.dtype == self.conv.weight.dtype == self.norm.weight.dtype
            and x.dtype.itemsize >= 4
            and not autocast_enabled(x.device)
            and not torch.compiler.is_compiling()
        )

    def _step(self, x: Tensor) -> Tensor:
        """`forward` in training, as one function."""
        count = x.numel() // self.dim
        norm1, norm2 = self.norm, self.norm2
        out, mean1, variance1, mean2, variance2, _ = SpatialStep.apply(
            x.reshape(count, self.dim),
            self.conv_attn.weight.flatten(),
            norm1.weight,
            norm1.bias,
            self.conv.weight.flatten(1),
            norm2.weight,
            norm2.bias,
            norm1.eps,
            norm2.eps,
        )
        track(norm1, mean1, variance1, count)
        track(norm2, mean2, variance2, count)
        joined: Tensor = out.reshape(x.shape)
        return joined

    def _convolve(self, x: Tensor) -> Tensor:
        """The 1x1 convolution of the normalised `x` (B, *S, c); on the CPU norm and convolution as one linear layer."""
        count = x.numel() // x.shape[-1]
        weight = self.conv.weight.flatten(1)
        batch = uses_batch(self.norm2, count)
        if by_kernel(x) or (isinstance(self.norm2, nn.SyncBatchNorm) and batch):
            return F.linear(batch_norm(self.norm2, x), weight)
        statistics = None
        if batch:
            mean, variance = moments(x.reshape(1, count, x.shape[-1]))
            statistics = mean[0], variance[0]
        scale, shift = scale_and_shift(self.norm2, statistics, count)
        return F.linear(x, (weight * scale).to(weight.dtype), torch.mv(weight, shift.to(weight.dtype)))

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}, rank={self.rank}, partial={self.partial}"


class EuclideanBias(nn.Module):
    """iRPE's bias of a pair of positions: one value per head and bucket of their distance.

    Args:
        num_heads: Heads h.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        # Buckets of negative distances exist in the official table and are never used here.
        self.lookup_table_bias = nn.Parameter(torch.zeros(num_heads, 2 * BETA + 1))

    def forward(self, size: tuple[int, ...]) -> Tensor:
        """The bias (h, N, N) of all pairs of positions of a map of `size`."""
        rank = len(size)
        # Computing the entries takes longer than the bias itself.
        entries, pairs = kept(_entries, self.lookup_table_bias, tuple(size))
        bias = self.lookup_table_bias[:, entries]  # (h, 2 s_1 - 1, ...), by offset
        for axis, each in enumerate(pairs, 1):
            bias = bias.index_select(axis, each)
        bias = bias.reshape(-1, *(side for each in size for side in (each, each)))  # (h, s_1, s_1, s_2, s_2, ...)
        bias = bias.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2))
        return bias.reshape(-1, math.prod(size), math.prod(size))


def _entries(size: tuple[int, ...], like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Entries of the table by offset, (2 s_1 - 1, ...), and along each axis the offset of every pair, (s_i * s_i)."""
    rank, device = len(size), like.device
    squares = torch.zeros((1,) * rank, device=device)
    pairs = []
    for axis, each in enumerate(size):
        offsets = torch.arange(2 * each - 1, device=device, dtype=torch.float32) - (each - 1)
        squares = squares + offsets.square().reshape(*(1,) * axis, -1, *(1,) * (rank - 1 - axis))
        line = torch.arange(each, device=device)
        pairs.append((line - line[:, None] + (each - 1)).flatten())
    return BETA + bucket(squares.sqrt()), pairs


def bucket(distance: Tensor) -> Tensor:
    """The bucket, an integer from 0 to BETA, of a Euclidean distance of 0 or more."""
    rounded = distance.round()
    far = ALPHA + (rounded.clamp(min=1) / ALPHA).log() / math.log(GAMMA / ALPHA) * (BETA - ALPHA)
    return torch.where(rounded <= ALPHA, rounded, far.round().clamp(max=BETA)).long()


class SelfAttention(nn.Module):
    """The attention of PAT_sf: softmax(q k^T / sqrt(d) + bias of the distance) v.

    Args:
        dim: Channels c.
        num_heads: Heads h.
        attn_drop: Probability of dropping an attention weight, in training.
        proj_drop: Probability of dropping an output, in training.
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float, proj_drop: float) -> None:
        super().__init__()
        self.num_heads, self.attn_drop = num_heads, check.probability("attn_drop", attn_drop)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(check.probability("proj_drop", proj_drop))
        self.rpe_k = EuclideanBias(num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the positions of `x` (B, *S, c)."""
        q, k, v = self.heads(x)
        with without_autocast(x.device):
            # A bias with a gradient keeps torch from its fused kernel, and then the plain products are faster.
            logits = exact_logits(q, k, q.shape[-1] ** -0.5)
            weights = (logits + self.rpe_k(tuple(x.shape[1:-1]))).softmax(-1)
            weights = F.dropout(weights, self.attn_drop, self.training)
            out = torch.matmul(weights.to(v.dtype), v)  # (B, h, N, d)
        out = out.transpose(1, 2).reshape(x.shape)
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` of `x` (B, *S, c) attends to every token: (B, h, *S), summing to 1."""
        size = tuple(x.shape[1:-1])
        position = flat_index(query, size)
        q, k, _ = self.heads(x)
        logits = exact_logits(q[:, :, position, None], k, q.shape[-1] ** -0.5)  # (B, h, 1, N)
        weights: Tensor = (logits + self.rpe_k(size)[:, position, None]).softmax(-1)
        return weights.reshape(x.shape[0], self.num_heads, *size)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, h, N, d) of `x` (B, *S, c)."""
        tokens = x.flatten(1, -2)
        qkv: Tensor = self.qkv(tokens)
        shape = (*tokens.shape[:2], 3, self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = qkv.reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v


class PartialSelfAttention(nn.Module):
    """PAT_sf: the first C / n_div channels are convolved, the others normalised and attended over all positions.

    Border policy: zeros around the convolution; attention takes every position. Memory grows with the square of the
    number of positions: it is meant for the coarsest maps.

    Args:
        dim: Channels C.
        num_heads: Heads h of the C - C / n_div attended channels.
        rank: Number of spatial axes.
        n_div: The convolution takes one channel in `n_div`.
        attn_drop: Probability of dropping an attention weight, in training; officially 0.1.
        proj_drop: Probability of dropping an output of the attention, in training; officially 0.1.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        rank: int = 2,
        n_div: int = 4,
        attn_drop: float = 0.1,
        proj_drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim, self.n_div = check.positive("dim", dim), n_div
        self.rank = check.rank_of("PartialSelfAttention", rank, self.supported_ranks)
        self.convolved = convolved_channels(dim, n_div)
        attended = dim - self.convolved
        check.positive("num_heads", num_heads)
        if attended % num_heads:
            valid = [heads for heads in range(1, attended + 1) if attended % heads == 0]
            raise ValueError(f"num_heads must divide the {attended} attended channels: one of {valid}, got {num_heads}")
        self.num_heads = num_heads
        self.partial_conv3 = CONV[rank](self.convolved, self.convolved, 3, padding=1, bias=False)
        self.norm = nn.LayerNorm(attended, eps=1e-6)
        self.attn = SelfAttention(attended, num_heads, attn_drop, proj_drop)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        """Mix `x` (B, *S, C); the same shape comes back."""
        check.channels_last("PartialSelfAttention", x, self.dim, (self.rank,))
        first, rest = torch.split(x, [self.convolved, self.dim - self.convolved], dim=-1)
        return torch.cat([convolve(self.partial_conv3, first), self.attn(self.norm(rest))], dim=-1)

    def attention_map(self, x: Tensor, query: Sequence[int]) -> Tensor:
        """How much the token at index `query` attends to every token of `x` (B, *S, C): (B, h, *S), summing to 1."""
        return self.attn.attention_map(self.norm(x[..., self.convolved :]), query)

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return f"dim={self.dim}, num_heads={self.num_heads}, rank={self.rank}, n_div={self.n_div}"
