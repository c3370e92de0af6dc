"""MaxViT: convolution, attention within windows and attention over a grid, in every block of every stage.

Paper: Tu et al., "MaxViT: Multi-Axis Vision Transformer", ECCV 2022, arXiv 2204.01697.
Code: github.com/google-research/maxvit (Apache-2.0), as ported in timm 1.0.31 (Apache-2.0), timm/models/maxxvit.py; the
`rw` variants are that library's own. Nothing is copied from either; timm's weights fit as they are, under timm's keys.

    x = shortcut(x) + mbconv(x)              the first block of a stage strides by 2
    x = x + window(norm(x)), x = x + mlp(norm(x))
    x = x + grid(norm(x)),   x = x + mlp(norm(x))

Windows and grids have P tokens per axis, P = `img_size` // 32, in every stage.

Deviations:
- Any image size. A map that P does not divide is filled up with positions that take no part; timm refuses it. The
  pooled shortcut of the `rw` variants keeps the last row or column of an odd map, as its convolution does; timm's
  shapes do not match there.
- `img_size` only fixes P. timm behaves the same, for sizes that P divides in every stage.
- The bias MLP of `rmlp` is evaluated once per offset, not once per buffer entry; equal.

Legend: B batch, C channels, H and W the map's sides, P tokens per axis of a window and of a grid.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visattn.attention import WindowAttention
from visattn.backbones._backbone import Backbone, Head, Stage
from visattn.backbones._build import build, config, image_size
from visattn.backbones._maxvit_block import RW, TF, Block, Hidden, Lineage, Stem
from visattn.backbones._residual import init_convolutions, layers
from visattn.blocks import drop_path_rates

TABLE = "relative_position_bias_table"


def maxvit(
    *,
    kind: Lineage,
    depths: Sequence[int],
    widths: Sequence[int],
    stem: tuple[int, int],
    img_size: int | Sequence[int],
    rel_pos: Literal["table", "log_mlp"] = "table",
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
) -> Backbone:
    """Build a MaxViT.

    Args:
        kind: `TF` or `RW`.
        depths: Blocks of each stage.
        widths: Channels of each stage, multiples of 32.
        stem: Channels of the stem's two convolutions.
        img_size: Side of the images in pixels, or (H, W), each at least 32: windows and grids have a 32nd of it,
            rounded down. Images of other sizes are taken too.
        rel_pos: Position biases from tables, or from an MLP.
        in_chans: Channels of the images.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: `avg`, `max`, or empty for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.

    Raises:
        UserError: `img_size` is no size, or too small.
    """
    height, width = image_size(img_size)
    partition = (height // 32, width // 32)
    rates = drop_path_rates(drop_path_rate, depths)
    inputs = [stem[1], *widths[:-1]]
    stages = []
    for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        blocks = []
        for i in range(depth):
            first = i == 0
            dim, stride = (inputs[index], 2) if first else (width, 1)
            blocks.append(Block(dim, width, stride, partition, kind, rel_pos, rates[index][i]))
        stages.append(Stage(nn.Identity(), blocks))
    width = widths[-1]
    head = Head(
        width,
        num_classes,
        pool=global_pool,
        channels_last=False,
        norm=nn.LayerNorm(width, eps=kind.ln_eps) if kind.hidden_head else None,
        hidden=Hidden(width) if kind.hidden_head else None,
        drop_rate=drop_rate,
    )
    network = Backbone(
        Stem(in_chans, stem, kind),
        stages,
        widths=widths,
        reductions=[4 * 2**index for index in range(len(widths))],
        norm=nn.Identity() if kind.hidden_head else layers.LayerNorm2d(width, eps=kind.ln_eps),
        head=head,
        in_chans=in_chans,
        num_classes=num_classes,
        channels_last=False,
        no_decay=(TABLE, *(f"rel_pos.mlp.{layer}.{each}" for layer in ("fc1", "fc2") for each in ("weight", "bias"))),
    )
    init_convolutions(network)
    for name, module in network.stages.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.normal_(module.bias, std=1e-6 if ".mlp." in name else 0.0)
    network.register_load_state_dict_pre_hook(_fit_on_load)  # type: ignore[no-untyped-call]
    return network


def official_name(key: str) -> str:
    """The key in timm: the same."""
    return key


def unused(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Entries that timm's forward pass never reads: none."""
    return {}


def translate(official: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of timm with position tables for the partition of `model`, and linear layers as matrices.

    A table stored as a list of offsets does not tell the sides of its window: it is taken for a square one if it can
    be, as in timm.
    """
    partition = _partition(model)
    tensors = _as_matrices(official, model)
    for key, value in tensors.items():
        if key.endswith(TABLE):
            tensors[key] = _resized(value, partition, always=value.ndim == 2 and partition[0] != partition[1])
    return tensors


def _as_matrices(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """`state` with linear layers as matrices: timm once stored them as 1x1 convolutions."""
    own = model.state_dict()
    return {
        key: value.flatten(1) if value.ndim == 4 and key in own and own[key].ndim == 2 else value
        for key, value in state.items()
    }


def _partition(model: nn.Module) -> tuple[int, int]:
    height, width = next(each.window_size for each in model.modules() if isinstance(each, WindowAttention))
    return height, width


def _resized(table: Tensor, partition: tuple[int, int], always: bool = False) -> Tensor:
    """`table` for windows of `partition` by timm's rule; as it is where it fits, unless `always`, or is no table."""
    sides = (2 * partition[0] - 1, 2 * partition[1] - 1)
    flat = table.ndim == 2
    shape = (math.prod(sides), table.shape[1]) if flat else (table.shape[0], *sides)
    square = math.isqrt(len(table)) ** 2 == len(table) if flat else table.ndim == 3
    if not square or (tuple(table.shape) == shape and not always):
        return table
    with warnings.catch_warnings():
        # Of torch, about how timm's interpolation indexes; its result is tested.
        warnings.filterwarnings("ignore", module=r"timm\.layers\.interpolate")
        out: Tensor = layers.resize_rel_pos_bias_table(table, new_window_size=partition, new_bias_shape=shape)
    return out.reshape(shape)  # older releases of timm drop the axis of a single head


def _fit_on_load(model: nn.Module, state: dict[str, Any], prefix: str, *_others: Any) -> None:
    """Before `load_state_dict`: tables of weights in our own form that were saved for another partition."""
    partition = _partition(model)
    for key, value in state.items():
        if key.startswith(prefix) and key.endswith(TABLE):
            state[key] = _resized(value, partition)


_CONFIG = config("stem.conv1", crop_pct=0.95, license="apache-2.0", paper_ids="arXiv:2204.01697")
_HALF = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
_RW_CONFIG = {**_CONFIG, **_HALF, "input_size": (3, 256, 256), "pool_size": (8, 8)}

default_cfgs = generate_default_cfgs(
    {
        "va_maxvit_rmlp_pico_rw_256": _RW_CONFIG,
        "va_maxvit_rmlp_nano_rw_256": _RW_CONFIG,
        "va_maxvit_rmlp_tiny_rw_256": _RW_CONFIG,
        "va_maxvit_nano_rw_256": _RW_CONFIG,
        "va_maxvit_tiny_rw_256": _RW_CONFIG,
        "va_maxvit_tiny_tf_224": _CONFIG,
        "va_maxvit_small_tf_224": _CONFIG,
        "va_maxvit_base_tf_224": _CONFIG,
        "va_maxvit_large_tf_224": _CONFIG,
        "va_maxvit_xlarge_tf_224": {**_CONFIG, **_HALF},
    }
)


def _build(variant: str, pretrained: bool, defaults: Mapping[str, Any], kwargs: Mapping[str, Any]) -> nn.Module:
    # Tables are resized by `_fit_on_load`: what timm loads by our names was saved by our models.
    return build(maxvit, variant, pretrained, pretrained_filter_fn=_as_matrices, **{**defaults, **kwargs})


def _rw(variant: str, pretrained: bool, kwargs: Mapping[str, Any], **plan: Any) -> nn.Module:
    default = {"kind": RW, "widths": (64, 128, 256, 512), "stem": (32, 64), "img_size": 256}
    return _build(variant, pretrained, {**default, **plan}, kwargs)


def _tf(variant: str, pretrained: bool, kwargs: Mapping[str, Any], width: int, stem: int, **plan: Any) -> nn.Module:
    widths = tuple(width * 2**index for index in range(4))
    default = {"kind": TF, "depths": (2, 6, 14, 2), "widths": widths, "stem": (stem, stem), "img_size": 224}
    return _build(variant, pretrained, {**default, **plan}, kwargs)


@register_model
def va_maxvit_rmlp_pico_rw_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MaxViT-RW pico of timm, with an MLP for position biases."""
    plan = {"depths": (2, 2, 5, 2), "widths": (32, 64, 128, 256), "stem": (24, 32), "rel_pos": "log_mlp"}
    return _rw("va_maxvit_rmlp_pico_rw_256", pretrained, kwargs, **plan)


@register_model
def va_maxvit_rmlp_nano_rw_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MaxViT-RW nano of timm, with an MLP for position biases."""
    return _rw("va_maxvit_rmlp_nano_rw_256", pretrained, kwargs, depths=(1, 2, 3, 1), rel_pos="log_mlp")


@register_model
def va_maxvit_rmlp_tiny_rw_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MaxViT-RW tiny of timm, with an MLP for position biases."""
    return _rw("va_maxvit_rmlp_tiny_rw_256", pretrained, kwargs, depths=(2, 2, 5, 2), rel_pos="log_mlp")


@register_model
def va_maxvit_nano_rw_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MaxViT-RW nano of timm, with tables of position biases."""
    return _rw("va_maxvit_nano_rw_256", pretrained, kwargs, depths=(1, 2, 3, 1))


@register_model
def va_maxvit_tiny_rw_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MaxViT-RW tiny of timm, with tables of position biases."""
    return _rw("va_maxvit_tiny_rw_256", pretrained, kwargs, depths=(2, 2, 5, 2))


@register_model
def va_maxvit_tiny_tf_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's MaxViT-T."""
    return _tf("va_maxvit_tiny_tf_224", pretrained, kwargs, 64, 64, depths=(2, 2, 5, 2))


@register_model
def va_maxvit_small_tf_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's MaxViT-S."""
    return _tf("va_maxvit_small_tf_224", pretrained, kwargs, 96, 64, depths=(2, 2, 5, 2))


@register_model
def va_maxvit_base_tf_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's MaxViT-B."""
    return _tf("va_maxvit_base_tf_224", pretrained, kwargs, 96, 64)


@register_model
def va_maxvit_large_tf_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's MaxViT-L."""
    return _tf("va_maxvit_large_tf_224", pretrained, kwargs, 128, 128)


@register_model
def va_maxvit_xlarge_tf_224(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The paper's MaxViT-XL."""
    return _tf("va_maxvit_xlarge_tf_224", pretrained, kwargs, 192, 192)
