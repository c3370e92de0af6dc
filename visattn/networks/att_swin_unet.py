"""Att-SwinU-Net: a U-Net of shifted-window transformers whose skips may attend across.

Paper: Aghdam et al., "Attention Swin U-Net: Cross-Contextual Attention Mechanism for Skin Lesion Segmentation", ISBI
2023, arXiv 2210.16898. Official code: github.com/NITR098/AttSwinUNet, revision 4b14f37 (nothing is copied from it).

As coded (`variant="official"`, which the checkpoints need):
- The "spatial attention" of the paper does nothing there: the encoder's weights are added to a map that has been used
  already. What its switch changes is that skip and decoder are joined twice, by the same layer: `double_concat`.
- Cross-contextual attention leaves the first token out of the keys and changes nothing but that token.
- Skips are the inputs of the encoder's stages. A single channel is repeated three times.
`variant="paper"`: the decoder reads its values with the mean of its own attention weights and those of the encoder's
block at the same resolution, whose weights are kept; and in cross-contextual attention all tokens take part. The paper
leaves open how the two maps combine; the mean keeps rows that sum to 1.

Deviations: the official code takes 224x224 only and crashes in its cross-contextual mode (an attribute is missing).
Here images are padded with zeros at the bottom and on the right, to `img_size` at least and to multiples of 32; a
window that a map does not fill is masked, and a map one window wide along one axis is shifted along the other alone.

Legend: B batch, H W rows and columns of a map, C channels, K classes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from visattn.attention import CrossContextualAttention, WindowAttention
from visattn.blocks import Mlp, PatchMerging, drop_path, drop_path_rates, init_linear
from visattn.errors import UserError, unknown
from visattn.networks._sizes import crop, pad_to_multiple
from visattn.weights import load_renamed

Fusion = Literal["concat", "double_concat", "cross_contextual"]
FUSIONS = ("concat", "double_concat", "cross_contextual")
DEPTHS, HEADS, WIDTHS = (2, 2, 6, 2), (3, 6, 12, 24), (96, 192, 384, 768)
WINDOW = 7
PATCH = 4

INFO: dict[str, Any] = {
    "name": "att_swin_unet",
    "task": "segmentation",
    "input": "2-D, any size, any channels",
    "parameters": 41_380_068,
    "paper": "Aghdam et al., ISBI 2023, arXiv 2210.16898",
    "licence": "none stated by the authors; not included",
}
"""What `visattn models` shows; parameters with the default arguments."""


class SwinBlock(nn.Module):
    """Window attention and MLP, each after a norm and around a residual."""

    def __init__(self, dim: int, num_heads: int, shift: int, rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window_size=WINDOW, shift_size=shift)
        self.drop_path = drop_path(rate)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, guide: "tuple[SwinBlock, Tensor] | None" = None) -> Tensor:
        """(B, H, W, C) to the same shape; `guide` is the encoder's block and its input."""
        normed = self.norm1(x)
        if guide is None:
            mixed = self.attn(normed)
        else:
            block, other = guide
            mixed = self.attn.guided(normed, block.attn, block.norm1(other))
        x = x + self.drop_path(mixed)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class PatchEmbed(nn.Module):
    """Patches of 4x4 pixels, and a norm: (B, 3, H, W) to (B, H/4, W/4, C)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """The map of patches."""
        out: Tensor = self.norm(self.proj(x).movedim(1, -1))
        return out


class PatchExpand(nn.Module):
    """One token becomes `scale` x `scale` of them: (B, H, W, C) to (B, scale H, scale W, dim_out)."""

    def __init__(self, dim: int, dim_out: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale * scale * dim_out, bias=False)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """The finer map."""
        batch, height, width, _ = x.shape
        x = self.expand(x).reshape(batch, height, width, self.scale, self.scale, -1)
        x = x.transpose(2, 3).reshape(batch, height * self.scale, width * self.scale, -1)
        x = self.norm(x)
        return x


class Stage(nn.Module):
    """Blocks at one resolution, and the layer behind them, `downsample` or `upsample`."""

    def __init__(self, level: int, rates: Sequence[float], **after: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(WIDTHS[level], HEADS[level], 0 if i % 2 == 0 else WINDOW // 2, rate)
            for i, rate in enumerate(rates)
        )
        self.last = next(iter(after), "")
        for name, module in after.items():
            self.add_module(name, module)

    def run(self, x: Tensor, guides: "Sequence[tuple[SwinBlock, Tensor]] | None" = None) -> tuple[Tensor, list[Tensor]]:
        """The map behind the blocks, and the input of each block."""
        inputs = []
        for i, block in enumerate(self.blocks):
            inputs.append(x)
            x = block(x, None if guides is None else guides[i])
        return x, inputs

    def forward(self, x: Tensor, guides: "Sequence[tuple[SwinBlock, Tensor]] | None" = None) -> Tensor:
        """The map that the next stage takes."""
        return self.leave(self.run(x, guides)[0])

    def leave(self, x: Tensor) -> Tensor:
        """What the layer behind the blocks makes of their map."""
        out: Tensor = self.get_submodule(self.last)(x) if self.last else x
        return out


class Encoder(nn.Module):
    """Image to the deepest map, with what the skips and the guides need."""

    def __init__(self, in_channels: int, rates: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(in_channels, WIDTHS[0])
        last = len(DEPTHS) - 1
        self.layers = nn.ModuleList(
            Stage(i, rates[i], **({} if i == last else {"downsample": PatchMerging(WIDTHS[i])}))
            for i in range(last + 1)
        )
        self.norm = nn.LayerNorm(WIDTHS[-1])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
        """The deepest map, the input of each stage, and the input of each block of each stage."""
        x = self.patch_embed(x)
        skips, inputs = [], []
        for layer in cast(Iterable[Stage], self.layers):
            skips.append(x)
            x, each = layer.run(x)
            inputs.append(each)
            x = layer.leave(x)
        return self.norm(x), skips, inputs


class Decoder(nn.Module):
    """The deepest map to logits, the encoder's levels mirrored."""

    def __init__(
        self, classes: int, rates: Sequence[Sequence[float]], fusion: Fusion, cross_levels: int, variant: str
    ) -> None:
        super().__init__()
        self.fusion = fusion
        last = len(WIDTHS) - 1
        self.layers_up = nn.ModuleList([PatchExpand(WIDTHS[last], WIDTHS[last - 1], 2)])
        self.concat_back_dim = nn.ModuleList([nn.Identity()])
        for level in reversed(range(last)):
            after = {"upsample": PatchExpand(WIDTHS[level], WIDTHS[level - 1], 2)} if level else {}
            self.layers_up.append(Stage(level, rates[level], **after))
            self.concat_back_dim.append(nn.Linear(2 * WIDTHS[level], WIDTHS[level]))
        tokens: Any = "code" if variant == "official" else "all"
        crossing = range(last - cross_levels, last) if fusion == "cross_contextual" else range(0)
        self.Crossvit_layer = nn.ModuleDict(
            {str(level): CrossContextualAttention(WIDTHS[level], 8, tokens=tokens) for level in crossing}
        )
        self.norm_up = nn.LayerNorm(WIDTHS[0])
        self.up = PatchExpand(WIDTHS[0], WIDTHS[0], PATCH)
        self.output = nn.Conv2d(WIDTHS[0], classes, 1, bias=False)

    def forward(
        self, x: Tensor, skips: Sequence[Tensor], guides: Mapping[int, Sequence[tuple[SwinBlock, Tensor]]]
    ) -> Tensor:
        """Logits (B, K, H, W)."""
        x = self.layers_up[0](x)
        for i in range(1, len(self.layers_up)):
            level = len(self.layers_up) - 1 - i
            x = self._join(x, skips[level], self.concat_back_dim[i], str(level))
            x = self.layers_up[i](x, guides.get(level))
        out: Tensor = self.output(self.up(self.norm_up(x)).movedim(-1, 1))
        return out

    def _join(self, x: Tensor, skip: Tensor, linear: nn.Module, level: str) -> Tensor:
        if level in self.Crossvit_layer:
            x, skip = self.Crossvit_layer[level](x, skip)
        x = linear(torch.cat([x, skip], dim=-1))
        if self.fusion == "double_concat":
            x = linear(torch.cat([x, skip], dim=-1))
        return x


class AttSwinUNet(nn.Module):
    """The network that `att_swin_unet` builds; its parts have the official names."""

    output_names = ("logits",)

    def __init__(
        self,
        in_channels: int,
        classes: int,
        img_size: Sequence[int],
        fusion: Fusion,
        cross_levels: int,
        variant: str,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        rates = drop_path_rates(drop_path_rate, DEPTHS)
        self.in_channels, self.img_size, self.variant = in_channels, tuple(img_size), variant
        self.encoder = Encoder(3 if in_channels == 1 else in_channels, rates)
        self.decoder = Decoder(classes, rates, fusion, cross_levels, variant)
        self.apply(init_linear)

    def padded_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The size that images of the spatial `size` are padded to: `img_size` at least, and multiples of 32."""
        multiple = PATCH * 2 ** (len(WIDTHS) - 1)
        return tuple(-(-max(have, want) // multiple) * multiple for have, want in zip(size, self.img_size, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, in_channels, H, W), normalised; any size."""
        if x.ndim != 4:
            raise ValueError(f"expected images (B, C, H, W), got {tuple(x.shape)}")
        size = x.shape[2:]
        wanted = self.encoder.patch_embed.proj.in_channels
        if x.shape[1] == 1 and wanted == 3:
            x = x.expand(-1, 3, -1, -1)
        x = pad_to_multiple(x, self.padded_size(size))
        x, skips, inputs = self.encoder(x)
        guides: dict[int, list[tuple[SwinBlock, Tensor]]] = {}
        if self.variant == "paper":
            for level, layer in enumerate(cast(Iterable[Stage], self.encoder.layers)):
                blocks = cast(Iterable[SwinBlock], layer.blocks)
                guides[level] = list(zip(blocks, inputs[level], strict=True))
        return crop(self.decoder(x, skips, guides), size)


def att_swin_unet(
    in_channels: int = 3,
    classes: int = 1,
    img_size: int | Sequence[int] = 224,
    fusion: Fusion = "concat",
    cross_levels: int = 3,
    variant: Literal["official", "paper"] = "official",
    drop_path_rate: float = 0.1,
) -> AttSwinUNet:
    """Build Att-SwinU-Net.

    Args:
        in_channels: Channels of the image; one is repeated to three, as officially.
        classes: Output channels K.
        img_size: Smaller images are padded to this, (H, W) or one number; larger ones to multiples of 32.
        fusion: How skips join: `concat`, `double_concat` (the official default), or `cross_contextual`.
        cross_levels: Deepest levels that attend across, for `cross_contextual`; the others concatenate.
        variant: `official` as coded, `paper` as meant; see the file's first lines.
        drop_path_rate: Stochastic depth of the deepest blocks.

    Raises:
        UserError: An argument cannot be.
    """
    if fusion not in FUSIONS:
        raise unknown("fusion", str(fusion), FUSIONS)
    if variant not in ("official", "paper"):
        raise unknown("variant", str(variant), ("official", "paper"))
    if cross_levels not in (0, 1, 2, 3):
        raise UserError(f"network 'att_swin_unet': cross_levels must be 0 to 3, got {cross_levels!r}")
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides):
        raise UserError(f"network 'att_swin_unet': img_size must be one or two whole numbers, got {img_size!r}")
    return AttSwinUNet(in_channels, classes, sides, fusion, cross_levels, variant, drop_path_rate)


MODES = ("swin", "cross_contextual_attention")


def from_official(
    name: str,
    state_dict: Mapping[str, Tensor],
    mode: str = "swin",
    skip_num: str = "3",
    spatial_attention: str = "1",
    classes: int | None = None,
    **kwargs: Any,
) -> AttSwinUNet:
    """Att-SwinU-Net with the authors' weights, from the settings of their configuration.

    Args:
        name: `att_swin_unet`.
        state_dict: The official state dict, unwrapped.
        mode: `swin` or `cross_contextual_attention`.
        skip_num: Skips that attend across, deepest first, `"0"` to `"3"`, as text.
        spatial_attention: `"0"` or `"1"`; with mode `swin` it decides between one and two concatenations.
        classes: Output channels; None: the checkpoint's.
        kwargs: Further arguments of `att_swin_unet`.

    Raises:
        UserError: A setting that the official code does not have.
    """
    if mode not in MODES:
        raise unknown("mode", str(mode), MODES)
    if skip_num not in ("0", "1", "2", "3") or spatial_attention not in ("0", "1"):
        raise UserError(
            f"skip_num must be '0', '1', '2' or '3' and spatial_attention '0' or '1', as text, got {skip_num!r} and "
            f"{spatial_attention!r}.\nThe official code takes numbers for none of these in silence."
        )
    from visattn.networks import create_model

    twice = "double_concat" if spatial_attention == "1" else "concat"
    fusion = "cross_contextual" if mode == MODES[1] else twice
    if classes is None:
        classes = len(state_dict["decoder.output.weight"]) if "decoder.output.weight" in state_dict else 1
    network = create_model(name, classes=classes, fusion=fusion, cross_levels=int(skip_num), **kwargs)
    assert isinstance(network, AttSwinUNet)
    load_renamed(network, state_dict, official_name, _unused(state_dict, network), "official Att-SwinU-Net")
    return network


def official_name(key: str) -> str:
    """The official name of our entry `key`."""
    return key.replace(".attn.rel_pos.", ".attn.")


def _unused(official: Mapping[str, Tensor], network: AttSwinUNet) -> dict[str, tuple[int, ...]]:
    """Entries that the official forward pass never reads, or that it computes."""
    dim, last = WIDTHS[0], WIDTHS[-1]
    unused: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (dim, PATCH, PATCH, PATCH),
        **dict.fromkeys(("patch_embed.proj.bias", "patch_embed.norm.weight", "patch_embed.norm.bias"), (dim,)),
        **dict.fromkeys(("decoder.norm.weight", "decoder.norm.bias"), (last,)),
    }
    own = network.state_dict()
    for key, value in official.items():
        part = key.rpartition(".")[2]
        level = key.removeprefix("decoder.Crossvit_layer.").partition(".")[0]
        if part in ("relative_position_index", "attn_mask") or (
            key.startswith("decoder.Crossvit_layer.") and key not in own and level in ("0", "1", "2")
        ):
            unused[key] = tuple(value.shape)
    return unused
