"""Published attention blocks, one per file: tensor in, tensor out.

Tensors are channels-last, (B, *S, C), with one, two or three spatial axes *S; each class declares the ranks it
supports in `supported_ranks`. `ATTENTION` holds blocks with one input, `FUSION` those that bring two together.
"""

from torch import nn

from visattn.attention._natten import na1d, na2d, na3d
from visattn.attention._simulator import simulate
from visattn.attention.agent import AgentAttention
from visattn.attention.bilevel import BiLevelRoutingAttention
from visattn.attention.controls import DepthwiseConvolution, Identity
from visattn.attention.cross_contextual import CrossContextualAttention
from visattn.attention.dual import ChannelAttention, PositionAttention
from visattn.attention.ela import EfficientLocalAttention
from visattn.attention.full import FullAttention
from visattn.attention.gate import AttentionGate
from visattn.attention.halo import HaloAttention
from visattn.attention.lepe import LePEAttention
from visattn.attention.maxvit import GridAttention, WindowAttention
from visattn.attention.neighborhood import NeighborhoodAttention, neighborhood_attention
from visattn.attention.partial import PartialChannelAttention, PartialSelfAttention, PartialSpatialAttention
from visattn.attention.reverse import ReverseAttention

ATTENTION: dict[str, type[nn.Module]] = {
    "agent": AgentAttention,
    "bilevel": BiLevelRoutingAttention,
    "channel": ChannelAttention,
    "conv": DepthwiseConvolution,
    "ela": EfficientLocalAttention,
    "full": FullAttention,
    "grid": GridAttention,
    "halo": HaloAttention,
    "identity": Identity,
    "lepe": LePEAttention,
    "neighborhood": NeighborhoodAttention,
    "partial_channel": PartialChannelAttention,
    "partial_self": PartialSelfAttention,
    "partial_spatial": PartialSpatialAttention,
    "position": PositionAttention,
    "window": WindowAttention,
}
"""Blocks with one input, by the name that recipes use."""

FUSION: dict[str, type[nn.Module]] = {
    "cross_contextual": CrossContextualAttention,
    "gate": AttentionGate,
    "reverse": ReverseAttention,
}
"""Blocks with two inputs, by the name that recipes use."""

__all__ = [
    "ATTENTION",
    "FUSION",
    "AgentAttention",
    "AttentionGate",
    "BiLevelRoutingAttention",
    "ChannelAttention",
    "CrossContextualAttention",
    "DepthwiseConvolution",
    "EfficientLocalAttention",
    "FullAttention",
    "GridAttention",
    "HaloAttention",
    "Identity",
    "LePEAttention",
    "NeighborhoodAttention",
    "PartialChannelAttention",
    "PartialSelfAttention",
    "PartialSpatialAttention",
    "PositionAttention",
    "ReverseAttention",
    "WindowAttention",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
    "simulate",
]
