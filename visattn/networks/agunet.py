"""AGUNet and DAUNet: U-Nets with attention gates, a pyramid of inputs, deep supervision and dual attention.

Paper: Bouget et al., "Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms",
Frontiers in Radiology 2021, arXiv 2101.07715.
Official code: github.com/dbouget/mri_brain_tumor_segmentation, revision 7af4e77, src/Models/UNet (Keras, BSD-2-Clause;
nothing is copied from it).

Both: levels of two (convolution, batch norm, ReLU), max pooling by 2 between them. With `multi_scale_input` the image,
averaged by 2 again and again, joins the levels between the first and the last.

- AGUNet: a decoder level is transposed convolution, batch norm, ReLU = x; the gate weights the skip by x; [x, gated
  skip]; two convolutions.
- DAUNet: position and channel attention at the bottom; a decoder level joins [skip, transposed convolution], and with
  `attention_guiding` the bottom itself, brought up in one step: [guide, skip, up]; batch norm and ReLU over all of it.

Deviations:
- Outputs are logits, where the official ones are probabilities (their softmax).
- Any size: the input is padded with zeros at the end of each axis to a multiple of 2 to the number of poolings, and the
  outputs are cropped. The official code leaves axes of up to 4 voxels unpooled and then fails in the decoder.
- The gate can be Oktay's or absent, and the dual attention absent; the official code can switch off the rest alone.
- The projections of DAUNet's position attention are parameters; the official code draws them anew in every call, so
  that its weight files do not hold them.
- Two or three axes.

Legend: B batch, K classes, *S the spatial axes of the image, F the number of levels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visattn.attention import AttentionGate, ChannelAttention, PositionAttention
from visattn.errors import UserError
from visattn.networks._sizes import crop, pad_to_multiple

Gate = Literal["concatenate", "add"]

_CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
_UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORM: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVERAGE: dict[int, Any] = {2: F.avg_pool2d, 3: F.avg_pool3d}
_LARGEST: dict[int, Any] = {2: F.max_pool2d, 3: F.max_pool3d}

FILTERS = (16, 32, 128, 256, 256)

INFO: dict[str, dict[str, Any]] = {
    name: {
        "name": name,
        "task": "segmentation",
        "input": "3-D or 2-D, any size, any channels",
        "parameters": parameters,
        "paper": "Bouget et al., Front. Radiol. 2021, arXiv 2101.07715",
        "licence": "BSD-2-Clause code; no weights included",
    }
    for name, parameters in (("agunet", 18_657_716), ("daunet", 31_035_482))
}
"""What `visattn models` shows; parameters with the default arguments."""


def _norm(rank: int, width: int) -> nn.Module:
    norm: nn.Module = _NORM[rank](width, eps=1e-3, momentum=0.01)  # Keras's values
    return norm


class _Block(nn.Sequential):
    """Twice: convolution, batch norm, ReLU."""

    def __init__(self, rank: int, width: int, out: int) -> None:
        super().__init__(
            _CONV[rank](width, out, 3, padding=1),
            _norm(rank, out),
            nn.ReLU(inplace=True),
            _CONV[rank](out, out, 3, padding=1),
            _norm(rank, out),
            nn.ReLU(inplace=True),
        )


class _Upsample(nn.Module):
    """Keras's transposed convolution of kernel 3 and padding `same`: `stride` times the size."""

    def __init__(self, rank: int, width: int, out: int, stride: int) -> None:
        super().__init__()
        # `same` drops the end of what a stride of 2 gives, and fills up at the end what larger strides leave open.
        self.surplus = max(3 - stride, 0)
        self.conv = _UP[rank](width, out, 3, stride=stride, output_padding=max(stride - 3, 0))

    def forward(self, x: Tensor) -> Tensor:
        up: Tensor = self.conv(x)
        return crop(up, [size - self.surplus for size in up.shape[2:]])


class GatedLevel(nn.Module):
    """A decoder level of AGUNet."""

    def __init__(self, rank: int, width: int, out: int, gate: Gate | None) -> None:
        super().__init__()
        self.up, self.norm = _Upsample(rank, width, out, 2), _norm(rank, out)
        # Oktay's gate meets x at the skip's resolution here, as AGUNet's does.
        stride = 1 if gate == "add" else None
        self.gate = AttentionGate(out, out, form=gate, rank=rank, stride=stride) if gate is not None else None
        self.block = _Block(rank, 2 * out, out)

    def forward(self, x: Tensor, skip: Tensor, bottom: Tensor) -> Tensor:
        """`x` (B, width, *S / 2), `skip` (B, out, *S) to (B, out, *S)."""
        x = self.norm(self.up(x)).relu()
        if self.gate is not None:
            skip = self.gate(x.movedim(1, -1), skip.movedim(1, -1)).movedim(-1, 1)
        joined: Tensor = self.block(torch.cat([x, skip], dim=1))
        return joined


class GuidedLevel(nn.Module):
    """A decoder level of DAUNet, `stride` below the bottom's number of voxels an axis."""

    def __init__(self, rank: int, width: int, out: int, bottom: int, stride: int, guided: bool) -> None:
        super().__init__()
        self.up = _Upsample(rank, width, out, 2)
        self.guide = _Upsample(rank, bottom, out, stride) if guided else None
        self.norm = _norm(rank, (3 if guided else 2) * out)
        self.block = _Block(rank, (3 if guided else 2) * out, out)

    def forward(self, x: Tensor, skip: Tensor, bottom: Tensor) -> Tensor:
        """`x` (B, width, *S / 2), `skip` (B, out, *S), `bottom` (B, bottom, *S / stride) to (B, out, *S)."""
        parts = [skip, self.up(x)]
        if self.guide is not None:
            parts.insert(0, self.guide(bottom))
        joined: Tensor = self.block(self.norm(torch.cat(parts, dim=1)).relu())
        return joined


class DualAttention(nn.Module):
    """Position and channel attention side by side, each followed by two convolutions; their sum through a last one.

    One of the two may be left out, with its convolutions.
    """

    def __init__(
        self, rank: int, width: int, form: Literal["code", "paper"], dropout: float, position: bool, channel: bool
    ) -> None:
        super().__init__()
        self.pam = PositionAttention(width, form=form) if position else None
        self.cam = ChannelAttention(width, form=form) if channel else None
        self.position, self.channel = (
            nn.Sequential(
                _CONV[rank](width, width, 3, padding=1),
                _norm(rank, width),
                nn.ReLU(inplace=True),
                nn.Dropout(dropout),
                _CONV[rank](width, width, 3, padding=1),
            )
            if wanted
            else None
            for wanted in (position, channel)
        )
        self.dropout = nn.Dropout(dropout)
        self.conv, self.norm = _CONV[rank](width, width, 1), _norm(rank, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, *S) to the same shape."""
        last = x.movedim(1, -1)
        branches = ((self.pam, self.position), (self.cam, self.channel))
        parts = [convs(attend(last).movedim(-1, 1)) for attend, convs in branches if attend is not None and convs]
        mixed: Tensor = self.norm(self.conv(self.dropout(parts[0] if len(parts) == 1 else parts[0] + parts[1])))
        return mixed


class AttentionUNet(nn.Module):
    """AGUNet or DAUNet; build it with `agunet` or `daunet`.

    Attributes:
        output_names: `logits`, with deep supervision followed by `logits_1`, `logits_2`, ... of half, a quarter, ...
            the resolution.
    """

    def __init__(
        self,
        rank: int,
        in_channels: int,
        classes: int,
        filters: Sequence[int],
        levels: Sequence[nn.Module],
        bottom: nn.Module | None,
        multi_scale_input: bool,
        deep_supervision: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        depth = len(filters)
        self.rank, self.checkpointing = rank, checkpointing
        inner = range(1, depth - 1) if multi_scale_input else range(0)
        self.encoder = nn.ModuleList(
            _Block(rank, (filters[i - 1] if i else in_channels) + (filters[i] if i in inner else 0), filters[i])
            for i in range(depth)
        )
        self.pyramid = nn.ModuleDict({str(i): _CONV[rank](in_channels, filters[i], 3, padding=1) for i in inner})
        self.bottom = bottom
        self.decoder = nn.ModuleList(levels)  # by resolution, the full one first
        heads = depth - 1 if deep_supervision else 1
        self.heads = nn.ModuleList(_CONV[rank](filters[i], classes, 1) for i in range(heads))
        self.output_names = ("logits", *(f"logits_{i}" for i in range(1, heads)))
        for module in self.modules():
            if isinstance(module, nn.modules.conv._ConvNd):  # Keras's defaults
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each level again in the backward pass instead of keeping its activations."""
        self.checkpointing = enable

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(module, *inputs, use_reentrant=False)
        else:
            result = module(*inputs)
        return result

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits.

        Args:
            x: Images (B, in_channels, *S), normalised; any size.

        Returns:
            (B, K, *S), or with deep supervision a tuple of it and the coarser maps (B, K, ceil(S / 2**i)).

        Raises:
            ValueError: `x` has another number of axes.
        """
        if x.ndim != self.rank + 2:
            raise ValueError(f"expected images (B, C, {'D, ' if self.rank == 3 else ''}H, W), got {tuple(x.shape)}")
        sizes = x.shape[2:]
        x = pad_to_multiple(x, 2 ** (len(self.encoder) - 1))
        image, skips = x, []
        for i, block in enumerate(self.encoder):
            if i:
                x = _LARGEST[self.rank](x, 2)
            if str(i) in self.pyramid:
                image = _AVERAGE[self.rank](image, 2)
                x = torch.cat([self.pyramid[str(i)](image).relu(), x], dim=1)
            x = self._run(block, x)
            skips.append(x)
        if self.bottom is not None:
            x = self._run(self.bottom, x)
        bottom, outputs = x, []
        for i in reversed(range(len(self.decoder))):
            x = self._run(self.decoder[i], x, skips[i], bottom)
            if i < len(self.heads):
                outputs.append(crop(self.heads[i](x), [-(-size // 2**i) for size in sizes]))
        return tuple(reversed(outputs)) if len(outputs) > 1 else outputs[0]


def agunet(
    in_channels: int = 1,
    classes: int = 2,
    filters: Sequence[int] = FILTERS,
    multi_scale_input: bool = True,
    deep_supervision: bool = True,
    gate: Gate | None = "concatenate",
    dims: Literal[2, 3] = 3,
    checkpointing: bool = False,
) -> AttentionUNet:
    """Build AGUNet.

    Args:
        in_channels: Channels of the image.
        classes: Output channels.
        filters: Channels of the levels, the full resolution first; one pooling fewer than entries.
        multi_scale_input: Whether the shrunken image joins the inner levels.
        deep_supervision: Whether every decoder level has an output.
        gate: Attention gates on the skips: `concatenate` (AGUNet's), `add` (Oktay's), or None.
        dims: Number of spatial axes.
        checkpointing: Whether the backward pass computes activations again, for less memory and more time.

    Raises:
        UserError: An argument cannot be.
    """
    filters = _checked(filters, dims)
    if gate not in ("concatenate", "add", None):
        raise UserError(f"network 'agunet': gate must be concatenate, add or null, got {gate!r}")
    levels = [GatedLevel(dims, filters[i + 1], filters[i], gate) for i in range(len(filters) - 1)]
    return AttentionUNet(
        dims, in_channels, classes, filters, levels, None, multi_scale_input, deep_supervision, checkpointing
    )


def daunet(
    in_channels: int = 1,
    classes: int = 2,
    filters: Sequence[int] = FILTERS,
    multi_scale_input: bool = True,
    deep_supervision: bool = True,
    attention_guiding: bool = True,
    dual_attention: Literal["code", "paper"] | None = "code",
    position_attention: bool = True,
    channel_attention: bool = True,
    dropout: float = 0.5,
    dims: Literal[2, 3] = 3,
    checkpointing: bool = False,
) -> AttentionUNet:
    """Build DAUNet.

    Args:
        in_channels: Channels of the image.
        classes: Output channels.
        filters: Channels of the levels, the full resolution first; one pooling fewer than entries.
        multi_scale_input: Whether the shrunken image joins the inner levels.
        deep_supervision: Whether every decoder level has an output.
        attention_guiding: Whether the bottom's attention joins every decoder level.
        dual_attention: Position and channel attention at the bottom: as in the `code`, as in the `paper`, or None.
        position_attention: Whether the dual attention has its half over positions.
        channel_attention: Whether it has its half over channels.
        dropout: Share of values that the dual attention drops in training.
        dims: Number of spatial axes.
        checkpointing: Whether the backward pass computes activations again, for less memory and more time.

    Raises:
        UserError: An argument cannot be.
    """
    filters = _checked(filters, dims)
    if dual_attention not in ("code", "paper", None):
        raise UserError(f"network 'daunet': dual_attention must be code, paper or null, got {dual_attention!r}")
    depth, width = len(filters), filters[-1]
    bottom = None
    if dual_attention is not None and (position_attention or channel_attention):
        bottom = DualAttention(dims, width, dual_attention, dropout, position_attention, channel_attention)
    levels = [
        GuidedLevel(dims, filters[i + 1], filters[i], width, 2 ** (depth - 1 - i), attention_guiding)
        for i in range(depth - 1)
    ]
    return AttentionUNet(
        dims, in_channels, classes, filters, levels, bottom, multi_scale_input, deep_supervision, checkpointing
    )


def _checked(filters: Sequence[int], dims: int) -> tuple[int, ...]:
    if dims not in (2, 3):
        raise UserError(f"dims must be 2 or 3, got {dims!r}")
    if len(filters) < 2 or not all(isinstance(width, int) and width >= 1 for width in filters):
        raise UserError(f"filters needs at least two whole numbers above 0, one a level, got {filters!r}")
    return tuple(filters)
