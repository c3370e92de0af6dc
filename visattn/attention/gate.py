"""Attention gates: the decoder's features say which positions of a skip connection to let through.

Papers: Oktay et al., "Attention U-Net: Learning Where to Look for the Pancreas", MIDL 2018, arXiv 1804.03999, equations
1 and 2 (adding); Bouget et al., "Meningioma segmentation in T1-weighted MRI leveraging global context and attention
mechanisms", arXiv 2101.07715 (AGUNet, concatenating).
Official code: github.com/ozan-oktay/Attention-Gated-Networks, models/layers/grid_attention_layer.py (MIT), and
github.com/dbouget/mri_brain_tumor_segmentation, revision 7af4e77 (Keras, BSD-2-Clause). Nothing is
copied from either.

- concatenate: g = BN(conv(x)), s = BN(conv(skip)), psi = sigmoid(BN(conv(ReLU([g, s])))), out = skip * psi.
- add: psi = sigmoid(conv(ReLU(theta(skip) + phi(x)))), out = W(skip * psi), where theta reduces the skip by its stride
  and W is a 1x1 convolution with BN; `output_transform=False` leaves W out, as the paper's formula does.

Deviations:
- `add` resamples with half-pixel centres, torch's default today; the code is of a torch whose default was another. x
  may have any resolution, also the skip's.
- `add` of an axis shorter than the stride zero-pads it up to the stride, where the official convolution fails; a longer
  one drops the remainder of the division, as there.
- With one value per channel in training torch's batch norm raises; here the running statistics are used (`_norm.py`).

Legend: B batch, *S spatial axes of the skip, *T those of x, F channels of x, C channels of the skip.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visattn.attention import _checks as check
from visattn.attention._norm import batch_norm
from visattn.attention._resample import resize_linear

Form = Literal["concatenate", "add"]
FORMS = ("concatenate", "add")
CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """The 1x1 convolution `conv` of the last axis of `x` (B, *S, C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class AttentionGate(nn.Module):
    """A skip connection weighted position by position, by itself and the decoder's features.

    Border policy: none is needed at equal resolutions; see the file's deviations for the strided form.

    Args:
        dim: Channels F of the decoder's features x.
        skip_dim: Channels C of the skip; None means `dim`.
        form: `concatenate`: AGUNet's, at equal resolutions. `add`: Oktay's, at any two.
        rank: Number of spatial axes.
        inter_dim: Channels that x and skip are projected to; None means half of the skip's, at least 1.
        stride: Reduction of the skip before it meets x, one integer or one per axis; `add` only. None means 2.
        output_transform: Whether `add` ends with its 1x1 convolution and BN.
    """

    supported_ranks: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self,
        dim: int,
        skip_dim: int | None = None,
        *,
        form: Form = "concatenate",
        rank: int = 2,
        inter_dim: int | None = None,
        stride: int | Sequence[int] | None = None,
        output_transform: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check.positive("dim", dim)
        self.skip_dim = dim if skip_dim is None else check.positive("skip_dim", skip_dim)
        self.form = check.choice("form", form, FORMS)
        self.rank = check.rank_of("AttentionGate", rank, self.supported_ranks)
        inter = max(1, self.skip_dim // 2) if inter_dim is None else check.positive("inter_dim", inter_dim)
        if stride is not None and form == "concatenate":
            raise ValueError("stride needs form='add': form='concatenate' works at one resolution")
        self.stride = check.per_axis("stride", 2 if stride is None else stride, rank)
        self.output_transform = output_transform
        conv, norm = CONV[rank], NORM[rank]
        if form == "concatenate":
            self.x_conv, self.x_norm = conv(dim, inter, 1), norm(inter, eps=1e-3, momentum=0.01)
            self.skip_conv, self.skip_norm = conv(self.skip_dim, inter, 1), norm(inter, eps=1e-3, momentum=0.01)
            self.psi, self.psi_norm = conv(2 * inter, 1, 1), norm(1, eps=1e-3, momentum=0.01)
        else:
            self.theta = conv(self.skip_dim, inter, self.stride, stride=self.stride, bias=False)  # type: ignore[arg-type]
            self.phi = conv(dim, inter, 1)
            self.psi = conv(inter, 1, 1)
            if output_transform:
                self.W = nn.Sequential(conv(self.skip_dim, self.skip_dim, 1), norm(self.skip_dim))
        self._init_weights()

    def _init_weights(self) -> None:
        """Keras's defaults for AGUNet's, the official scheme for Oktay's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                if self.form == "concatenate":
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
                else:
                    nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d) and self.form == "add":
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Let through what `x` asks for.

        Args:
            x: The decoder's features (B, *T, F); for `concatenate` at the skip's resolution.
            skip: The encoder's features (B, *S, C).

        Returns:
            The gated skip (B, *S, C), not yet joined with x.

        Raises:
            ValueError: An input has another form.
        """
        gated = (skip * self.gate(x, skip)).to(skip.dtype)
        if self.form == "add" and self.output_transform:
            return batch_norm(self.W[1], pointwise(self.W[0], gated))  # type: ignore[arg-type]
        return gated

    def gate(self, x: Tensor, skip: Tensor) -> Tensor:
        """The weights psi (B, *S, 1) of the skip's positions, between 0 and 1; arguments as in `forward`."""
        check.channels_last("AttentionGate's x", x, self.dim, (self.rank,))
        check.channels_last("AttentionGate's skip", skip, self.skip_dim, (self.rank,))
        if self.form == "concatenate":
            if x.shape[:-1] != skip.shape[:-1]:
                raise ValueError(
                    f"form='concatenate' takes x at the skip's resolution: resize x {tuple(x.shape)} to "
                    f"{tuple(skip.shape[1:-1])}, or use form='add'"
                )
            ours = batch_norm(self.x_norm, pointwise(self.x_conv, x))
            theirs = batch_norm(self.skip_norm, pointwise(self.skip_conv, skip))
            both = torch.cat([ours, theirs], dim=-1).relu()
            return torch.sigmoid(batch_norm(self.psi_norm, pointwise(self.psi, both)))
        if x.shape[0] != skip.shape[0]:
            raise ValueError(f"x and skip must have one batch size, got {x.shape[0]} and {skip.shape[0]}")
        short = [max(stride - size, 0) for stride, size in zip(self.stride, skip.shape[1:-1], strict=True)]
        maps = F.pad(skip.movedim(-1, 1), [each for amount in reversed(short) for each in (0, amount)])
        reduced = self.theta(maps).movedim(1, -1)
        asked = resize_linear(pointwise(self.phi, x), reduced.shape[1:-1])
        weights = torch.sigmoid(pointwise(self.psi, (reduced + asked).relu()))
        return resize_linear(weights, skip.shape[1:-1])

    def extra_repr(self) -> str:
        """The settings shown by `repr`."""
        text = f"dim={self.dim}, skip_dim={self.skip_dim}, form={self.form!r}, rank={self.rank}"
        if self.form == "add":
            text += f", stride={self.stride}, output_transform={self.output_transform}"
        return text
