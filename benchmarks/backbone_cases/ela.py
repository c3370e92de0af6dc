"""Networks with ELA against the plain definition of the block: channels first, a convolution and a norm per axis."""

import torch
from backbones import swapped
from torch import Tensor, nn

from visattn.attention import EfficientLocalAttention
from visattn.backbones._residual import ChannelsLast


class OfficialEla(nn.Module):
    """Means along both axes, each through the convolution, the norm and a sigmoid: factors of the map."""

    def __init__(self, conv: nn.Conv1d, groups: int) -> None:
        super().__init__()
        (kernel,) = conv.kernel_size
        self.conv = nn.Conv1d(
            conv.in_channels, conv.in_channels, kernel, padding=kernel // 2, groups=conv.groups, bias=False
        )
        self.gn = nn.GroupNorm(groups, conv.in_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gate `x` (B, C, H, W)."""
        batch, dim, height, width = x.shape
        rows = torch.mean(x, dim=3, keepdim=True).view(batch, dim, height)
        columns = torch.mean(x, dim=2, keepdim=True).view(batch, dim, width)
        rows = torch.sigmoid(self.gn(self.conv(rows))).view(batch, dim, height, 1)
        columns = torch.sigmoid(self.gn(self.conv(columns))).view(batch, dim, 1, width)
        return x * rows * columns


class Inner(nn.Module):
    """The block under the name that ours has."""

    def __init__(self, ours: EfficientLocalAttention) -> None:
        super().__init__()
        self.inner = OfficialEla(ours.conv, ours.gn.num_groups)

    def forward(self, x: Tensor) -> Tensor:
        """Gate `x` (B, C, H, W)."""
        return self.inner(x)


def official(model: nn.Module) -> nn.Module:
    """The plain formulation with the weights of `model`."""
    return swapped(model, {ChannelsLast: lambda ours: Inner(ours.inner)})


CASES = [
    ("va_mobilenetv2_ela_l", {"drop_rate": 0.0}, official, (0.95, 0.95)),
    ("va_resnet50_ela_l", {"drop_path_rate": 0.0}, official, (0.95, 0.95)),
]
