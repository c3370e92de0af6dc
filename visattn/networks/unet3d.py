"""The plain U-Net for volumes: the baseline that attention has to beat.

Papers: Çiçek et al., "3D U-Net: Learning Dense Volumetric Segmentation from Sparse Annotation", MICCAI 2016, arXiv
1606.06650; with what Isensee et al., "nnU-Net", Nature Methods 2021, arXiv 1809.10486, found to work: strided
convolutions instead of pooling, instance norm, leaky ReLU, strides and kernels that follow the voxels' shape, deep
supervision. The residual form adds each level's input to its output (He et al. 2016), as nnU-Net's later presets do.

Status: no parity target; written from these descriptions.

Legend: B batch, K classes, *S the spatial axes of the image.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visattn.blocks import CONV, conv_norm
from visattn.errors import UserError
from visattn.networks._sizes import crop, pad_to_multiple

Norm = Literal["instance", "batch", "group"]
PerLevel = Sequence[int | Sequence[int]]

_UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

FILTERS = (32, 64, 128, 256, 320)
SLOPE = 0.01  # of the leaky ReLU

INFO: dict[str, Any] = {
    "name": "unet3d",
    "task": "segmentation",
    "input": "3-D or 2-D, any size, any channels",
    "parameters": 16_546_690,
    "paper": "Cicek et al., MICCAI 2016, arXiv 1606.06650",
    "licence": "ours; no weights included",
}
"""What `visattn models` shows; parameters with the default arguments."""


class Level(nn.Module):
    """Two convolutions, each with norm and leaky ReLU; the first one strided.

    Args:
        dims: Number of spatial axes.
        width: Channels in.
        out: Channels out.
        kernel: Kernel of both convolutions, one number an axis, odd.
        stride: Stride of the first, one number an axis.
        norm: Kind of norm.
        residual: Whether the input, through a 1x1 convolution where its shape changes, is added before the last ReLU.
    """

    def __init__(
        self,
        dims: int,
        width: int,
        out: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        norm: Norm,
        residual: bool,
    ) -> None:
        super().__init__()
        padding = tuple(size // 2 for size in kernel)
        first = CONV[dims](width, out, tuple(kernel), tuple(stride), padding)
        second = CONV[dims](out, out, tuple(kernel), padding=padding)
        self.first = nn.Sequential(first, conv_norm(norm, dims, out), nn.LeakyReLU(SLOPE, inplace=True))
        self.second = nn.Sequential(second, conv_norm(norm, dims, out))
        self.shortcut: nn.Module | None = None
        if residual:
            same = width == out and all(step == 1 for step in stride)
            self.shortcut = nn.Identity() if same else CONV[dims](width, out, 1, tuple(stride))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, *S) to (B, out, *S / stride)."""
        y: Tensor = self.second(self.first(x))
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return nn.functional.leaky_relu(y, SLOPE)


class UNet(nn.Module):
    """The network that `unet3d` builds.

    Attributes:
        output_names: `logits`, with deep supervision followed by `logits_1`, `logits_2`, ... of the next levels'
            resolutions; the lowest but one is the last.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        classes: int,
        filters: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
        norm: Norm,
        residual: bool,
        deep_supervision: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.dims, self.checkpointing = dims, checkpointing
        widths = (in_channels, *filters)
        # The image itself is not reduced: strides[i] lies between the levels i and i + 1.
        self.reductions = [[1] * dims]
        for stride in strides:
            self.reductions.append([a * b for a, b in zip(self.reductions[-1], stride, strict=True)])
        first = ([1] * dims, *strides)
        self.encoder = nn.ModuleList(
            Level(dims, widths[i], widths[i + 1], kernels[i], first[i], norm, residual) for i in range(len(filters))
        )
        self.up = nn.ModuleList(
            _UP[dims](filters[i + 1], filters[i], tuple(strides[i]), tuple(strides[i])) for i in range(len(strides))
        )
        self.decoder = nn.ModuleList(
            Level(dims, 2 * filters[i], filters[i], kernels[i], [1] * dims, norm, residual) for i in range(len(strides))
        )
        heads = max(1, len(strides) - 1) if deep_supervision else 1
        self.heads = nn.ModuleList(CONV[dims](filters[i], classes, 1) for i in range(heads))
        self.output_names = ("logits", *(f"logits_{i}" for i in range(1, heads)))
        for module in self.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each level again in the backward pass instead of keeping its activations."""
        self.checkpointing = enable

    def _run(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(module, x, use_reentrant=False)
        else:
            result = module(x)
        return result

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Logits.

        Border policy: the image is padded with zeros at the end of each axis to a multiple of the product of the
        strides, and the outputs are cropped.

        Args:
            x: Images (B, in_channels, *S), normalised; any size.

        Returns:
            (B, K, *S), or with deep supervision a tuple of it and the coarser maps (B, K, ceil(S / reduction)).

        Raises:
            ValueError: `x` has another number of axes.
        """
        if x.ndim != self.dims + 2:
            raise ValueError(f"expected images (B, C, {'D, ' if self.dims == 3 else ''}H, W), got {tuple(x.shape)}")
        sizes = x.shape[2:]
        x = pad_to_multiple(x, self.reductions[-1])
        skips = []
        for level in self.encoder:
            x = self._run(level, x)
            skips.append(x)
        outputs = []
        for i in reversed(range(len(self.decoder))):
            x = self._run(self.decoder[i], torch.cat([self.up[i](x), skips[i]], dim=1))
            if i < len(self.heads):
                shapes = [-(-size // by) for size, by in zip(sizes, self.reductions[i], strict=True)]
                outputs.append(crop(self.heads[i](x), shapes))
        return tuple(reversed(outputs)) if len(outputs) > 1 else outputs[0]


def unet3d(
    in_channels: int = 1,
    classes: int = 2,
    filters: Sequence[int] = FILTERS,
    norm: Norm = "instance",
    residual: bool = False,
    deep_supervision: bool = False,
    kernels: PerLevel | None = None,
    strides: PerLevel | None = None,
    dims: Literal[2, 3] = 3,
    checkpointing: bool = False,
) -> UNet:
    """Build a plain U-Net.

    Args:
        in_channels: Channels of the image.
        classes: Output channels.
        filters: Channels of the levels, the full resolution first.
        norm: `instance`, `batch` or `group` (up to 8 groups).
        residual: Whether each level's input is added to its output.
        deep_supervision: Whether all decoder levels but the lowest have an output.
        kernels: Kernel of each level, one number or one an axis, odd; None: 3 everywhere. Thick slices want 1 along
            their axis in the first levels.
        strides: Stride between each two levels, one number or one an axis; None: 2 everywhere.
        dims: Number of spatial axes.
        checkpointing: Whether the backward pass computes activations again, for less memory and more time.

    Raises:
        UserError: An argument cannot be.
    """
    if dims not in (2, 3):
        raise UserError(f"network 'unet3d': dims must be 2 or 3, got {dims!r}")
    if len(filters) < 2 or not all(isinstance(width, int) and width >= 1 for width in filters):
        raise UserError(f"network 'unet3d': filters needs at least two whole numbers above 0, got {filters!r}")
    if norm not in ("instance", "batch", "group"):
        raise UserError(f"network 'unet3d': norm must be instance, batch or group, got {norm!r}")
    steps = _per_level("strides", strides, len(filters) - 1, dims, 2)
    sizes = _per_level("kernels", kernels, len(filters), dims, 3)
    if any(size % 2 == 0 for kernel in sizes for size in kernel):
        raise UserError(f"network 'unet3d': kernels must be odd, got {kernels!r}")
    return UNet(
        dims, in_channels, classes, filters, sizes, steps, norm, residual, deep_supervision, checkpointing
    )  # fmt: skip


def _per_level(key: str, given: PerLevel | None, levels: int, dims: int, default: int) -> list[list[int]]:
    if given is None:
        return [[default] * dims for _ in range(levels)]
    result = [[entry] * dims if isinstance(entry, int) else list(entry) for entry in given]
    fits = len(result) == levels and all(len(entry) == dims for entry in result)
    if not fits or not all(isinstance(number, int) and number >= 1 for entry in result for number in entry):
        raise UserError(
            f"network 'unet3d': {key} needs {levels} entries, each a whole number above 0 or {dims} of them, "
            f"got {given!r}"
        )
    return result
