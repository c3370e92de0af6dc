"""Cross-contextual attention: decoder and skip summarise themselves in one token each, which reads the other stream.

Paper: Aghdam et al., "Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion Segmentation", ISBI
2023, arXiv 2210.16898; after Chen et al., "CrossViT", ICCV 2021, arXiv 2103.14899.
Official code: github.com/NITR098/AttSwinUNet, revision 4b14f37 (no licence file; nothing is copied from it).

With a stream's summary c (the mean of all its tokens), per layer and stream, with weights of their own:
c += Attention(query LN(c), keys and values [LN(c), tokens of the other stream]). Only the query's side is normalised.

- `tokens="code"`: as the authors' code. Its lists of tokens lack the first one (the top-left position): it is no key,
  and it is replaced by the summary, while all other tokens leave unchanged. So the block acts through one position.
- `tokens="all"`: every token is a key, and what the summary has learned (c after all layers minus c before) is added
  to every token.

Deviations:
- There is one query per stream, so queries are taken to the tokens rather than all tokens to keys and values: with a
  head's query q, q . (K t) = (K^T q) . t and sum_t a_t (V t) = V sum_t a_t t. The numbers are the same, the tokens are
  never projected, and the cost falls by a factor of about the width of all heads over their number.
- Rank 3. Logits and softmax are float32 under half precision.

Legend: B batch, *S spatial axes with N positions in all, C channels, h heads, d channels of a head.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._precision import without_autocast

Tokens = Literal["code", "all"]
TOKENS = ("code", "all")


class CrossAttention(nn.Module):
    """One query per image that reads itself and a list of tokens.

    Args:
        dim: Channels C.
        num_heads: Heads h.
        dim_head: Channels d of a head.
        dropout: Probability of dropping a weight or an output, in training.
    """

    def __init__(self, dim: int, num_heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        inner = num_heads * dim_head
        self.num_heads, self.scale, self.dropout = num_heads, dim_head**-0.5, nn.Dropout(dropout)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim), nn.Dropout(dropout))

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """What `query` (B, 1, C) reads from itself and `tokens` (B, M, C): (B, 1, C)."""
        weights, context = self.weights(query, tokens)
        weights = self.dropout(weights).to(context.dtype)
        read = torch.matmul(weights, context)  # (B, h, C)
        values = self.to_kv.weight.chunk(2)[1].reshape(self.num_heads, -1, context.shape[-1])  # (h, d, C)
        out: Tensor = self.to_out(torch.einsum("bhc,hdc->bhd", read, values.to(read.dtype)).flatten(1)[:, None])
        return out

    def weights(self, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (B, h, 1 + M) of `query` itself and `tokens`, and both together (B, 1 + M, C)."""
        context = torch.cat([query.to(tokens.dtype), tokens], dim=1)
        q: Tensor = self.to_q(query)
        with without_autocast(query.device):
            precise = torch.promote_types(q.dtype, torch.float32)
            keys = self.to_kv.weight.chunk(2)[0].reshape(self.num_heads, -1, context.shape[-1]).to(precise)
            heads = q.reshape(q.shape[0], self.num_heads, keys.shape[1]).to(precise) * self.scale  # (B, h, d)
            asked = torch.einsum("bhd,hdc->bhc", heads, keys)
            logits = torch.matmul(asked, context.to(precise).mT)
        return logits.softmax(-1), context


class PreNorm(nn.Module):
    """Attention of the normalised query; the tokens stay as they are."""

    def __init__(self, dim: int, attention: CrossAttention) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), attention

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """What the normalised `query` (B, 1, C) reads from itself and `tokens` (B, M, C): (B, 1, C)."""
        out: Tensor = self.fn(self.norm(query), tokens)
        return out


class Summary(nn.Module):
    """One stream's step, under the official names `fn.norm` and `fn.fn`, with projections where the widths differ.

    Args:
        dim: Channels of this stream.
        other: Channels of the other stream, in which attention takes place.
        num_heads: Heads h.
        dim_head: Channels d of a head.
        dropout: Probability of dropping a weight or an output, in training.
    """

    def __init__(self, dim: int, other: int, num_heads: int, dim_head: int, dropout: float) -> None:
        super().__init__()
        self.fn = PreNorm(other, CrossAttention(other, num_heads, dim_head, dropout))
        self.project_in = nn.Linear(dim, other) if dim != other else nn.Identity()
        self.project_out = nn.Linear(other, dim) if dim != other else nn.Identity()

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """The new summary (B, 1, C) of `query` (B, 1, C) after reading `tokens` (B, M, C')."""
        out: Tensor = self.project_out(self.fn(self.project_in(query), tokens))
        return query + out


class CrossContextualAttention(nn.Module):
    """Both streams after each has read the other through one summary token.

    Border policy: none is needed, all positions are keys alike; with `tokens="code"` the first one is none. The
    parameters do not depend on the rank.

    Args:
        dim: Channels of x.
        num_heads: Heads h.
        skip_dim: Channels of the skip; None means `dim`.
        dim_head: Channels d of a head, officially 64 at every width.
        depth: Layers.
        tokens: `code`: as the authors' code. `all`: all tokens taking part. See the file's first lines.
        dropout: Probability of dropping a weight or an output, in training.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        skip_dim: int | None = None,
        dim_head: int = 64,
        depth: int = 2,
        tokens: Tokens = "code",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = check.positive("dim", dim)
        self.skip_dim = dim if skip_dim is None else check.positive("skip_dim", skip_dim)
        self.num_heads, self.dim_head = check.positive("num_heads", num_heads), check.positive("dim_head", dim_head)
        self.tokens = check.choice("tokens", tokens, TOKENS)
        drop = check.probability("dropout", dropout)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    Summary(self.dim, self.skip_dim, num_heads, dim_head, drop),
                    Summary(self.skip_dim, self.dim, num_heads, dim_head, drop),
                ]
            )
            for _ in range(check.positive("depth", depth))
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """Exchange what the streams know.

        Args:
            x: The decoder's features (B, *S, C).
            skip: The encoder's features (B, *T, C').

        Returns:
            x and skip after the exchange, each in its own shape; the official network concatenates them.

        Raises:
            ValueError: An input has another form.
        """
        check.channels_last("CrossContextualAttention's x", x, self.dim, self.supported_ranks)
        check.channels_last("CrossContextualAttention's skip", skip, self.skip_dim, self.supported_ranks)
        if x.shape[0] != skip.shape[0]:
            raise ValueError(f"x and skip must have one batch size, got {x.shape[0]} and {skip.shape[0]}")
        streams = [x.flatten(1, -2), skip.flatten(1, -2)]
        first = [stream.mean(dim=1, keepdim=True) for stream in streams]  # (B, 1, C)
        keys = [stream if self.tokens == "all" else stream[:, 1:] for stream in streams]
        summary = list(first)
        for layer in self.layers:
            ours, theirs = layer.children()
            summary = [ours(summary[0], keys[1]), theirs(summary[1], keys[0])]
        out = []
        for stream, before, after, shape in zip(streams, first, summary, (x.shape, skip.shape), strict=True):
            if self.tokens == "all":
                mixed = stream + (after - before).to(stream.dtype)
            else:
                mixed = torch.cat([after.to(stream.dtype), stream[:, 1:]], dim=1)
            out.append(mixed.reshape(shape))
        return out[0], out[1]

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, skip_dim={self.skip_dim}, dim_head={self.dim_head}, "
            f"depth={len(self.layers)}, tokens={self.tokens!r}"
        )
