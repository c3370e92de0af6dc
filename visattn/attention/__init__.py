"""Published attention blocks, one per file: tensor in, tensor out.

Tensors are channels-last, (B, *S, C), with one, two or three spatial axes *S; each class declares the ranks it
supports in `supported_ranks`. `ATTENTION` holds blocks with one input, `FUSION` those that bring two together.
"""

from torch import nn

from visattn.attention._natten import na1d, na2d, na3d
from visattn.attention.agent import AgentAttention
from visattn.attention.ela import EfficientLocalAttention
from visattn.attention.neighborhood import NeighborhoodAttention, neighborhood_attention
from visattn.attention.partial import PartialChannelAttention, PartialSelfAttention, PartialSpatialAttention
from visattn.attention.reverse import ReverseAttention

ATTENTION: dict[str, type[nn.Module]] = {
    "agent": AgentAttention,
    "ela": EfficientLocalAttention,
    "neighborhood": NeighborhoodAttention,
    "partial_channel": PartialChannelAttention,
    "partial_self": PartialSelfAttention,
    "partial_spatial": PartialSpatialAttention,
}
"""Blocks with one input, by the name that recipes use."""

FUSION: dict[str, type[nn.Module]] = {"reverse": ReverseAttention}
"""Blocks with two inputs, by the name that recipes use."""

__all__ = [
    "ATTENTION",
    "FUSION",
    "AgentAttention",
    "EfficientLocalAttention",
    "NeighborhoodAttention",
    "PartialChannelAttention",
    "PartialSelfAttention",
    "PartialSpatialAttention",
    "ReverseAttention",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
]
