"""What attention looks at: maps of a block's weights, and pictures of them.

`attention_map` asks a block; `draw_attention` lays the answer over an image; `draw_neighborhood` shows the window of
neighbourhood attention and what a tiled kernel makes of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from visattn.errors import UserError
from visattn.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor, nn

    from visattn.attention._simulator import Simulation

# From no to full weight; lightness grows all the way, so the order is seen in every type of colour vision, and in grey.
_STOPS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COLOURS = ((20, 11, 52), (99, 21, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164))
_CASING, _MARK = (20, 20, 24), (0, 229, 255)
_MOST_TILES = 4096  # of a side of the picture of products
_INK, _FAINT = "#222222", "#e8e8e8"


def attention_map(block: "nn.Module", x: "Tensor", query: Sequence[int], **options: Any) -> "Tensor":
    """How much one position of a map attends to every position of it.

    Args:
        block: A block of `visattn.attention` that weighs positions by a softmax. Dropout takes no part.
        x: The block's input, (B, *S, C).
        query: Index of a position of the map, one number per spatial axis.
        **options: What else the block's own `attention_map` takes, as `size` of agent attention with a class token.

    Returns:
        (B, heads, *S), without a gradient; sums to 1 over the map, but for weight on padding.

    Raises:
        TypeError: If the block weighs no positions.
        ValueError: If `query` is not in the map, or the block's keys have no single position (reduced or pooled keys).
    """
    import torch

    own = getattr(block, "attention_map", None)
    if own is None:
        from visattn.attention import ATTENTION

        able = ", ".join(sorted(name for name, each in ATTENTION.items() if hasattr(each, "attention_map")))
        raise TypeError(
            f"{type(block).__name__} weighs no positions by a softmax, so it has no attention map; those that do: "
            f"{able}. Of a network, pass one of its blocks, see network.named_modules()"
        )
    with torch.no_grad():
        weights: Tensor = own(x, tuple(query), **options)
    return weights


def draw_attention(
    image: NDArray[np.uint8], weights: Any, query: Sequence[int] | None = None, strength: float = 0.75
) -> NDArray[np.uint8]:
    """Lay the weights of one query over an image: what is looked at glows, the rest fades to grey.

    Args:
        image: (H, W), (H, W, 1) or (H, W, 3).
        weights: (h, w), or (heads, h, w), of which the mean is drawn: a tensor or an array, of any size. Each of its
            cells covers an equal part of the image. The largest weight gets the strongest colour.
        query: Index (row, column) of the query in the map of weights; it is outlined.
        strength: How much of the image the strongest colour covers, 0 to 1.

    Returns:
        (H, W, 3).

    Raises:
        ValueError: If the shapes are not as above, or `query` is not in the map.
    """
    import cv2

    values = np.asarray(weights.detach().float().cpu() if hasattr(weights, "detach") else weights, dtype=np.float64)
    if values.ndim == 3:
        values = values.mean(0)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(
            f"weights must be (h, w) or (heads, h, w), got {values.shape}: of a batch take one image, of a volume one "
            "slice"
        )
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(f"image must be uint8 (H, W), (H, W, 1) or (H, W, 3), got {image.dtype} {image.shape}")
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("weights must be finite and not negative")
    if query is not None and (
        len(query) != 2 or any(not 0 <= at < size for at, size in zip(query, values.shape, strict=True))
    ):
        raise ValueError(f"query must be an index into the map {values.shape}, got {tuple(query)}")
    height, width = image.shape[:2]
    colour = np.broadcast_to(image.reshape(height, width, -1), (height, width, 3)).astype(np.float64)
    grey = colour.mean(-1, keepdims=True).repeat(3, -1)
    largest = values.max()
    share = values / largest if largest > 0 else values
    share = cv2.resize(share, (width, height), interpolation=cv2.INTER_NEAREST)
    alpha = (strength * np.sqrt(share))[..., None]
    canvas: NDArray[np.uint8] = np.clip((1 - alpha) * grey * 0.8 + alpha * _heat(share), 0, 255).astype(np.uint8)
    if query is not None:
        top, left = (
            round(at * side / size) for at, side, size in zip(query, (height, width), values.shape, strict=True)
        )
        bottom, right = (
            round((at + 1) * side / size) - 1
            for at, side, size in zip(query, (height, width), values.shape, strict=True)
        )
        thin = max(1, round(max(height, width) / 300))
        for thickness, shade in ((3 * thin, _CASING), (thin, _MARK)):
            cv2.rectangle(canvas, (left, top), (max(left, right), max(top, bottom)), shade, thickness)
    return canvas


def _heat(share: NDArray[Any]) -> NDArray[Any]:
    """Colours (..., 3) of values from 0 to 1."""
    channels = [np.interp(share, _STOPS, [colour[channel] for colour in _COLOURS]) for channel in range(3)]
    return np.stack(channels, axis=-1)


def draw_neighborhood(simulation: "Simulation", path: Path | str) -> None:
    """Draw, as PNG, what some queries of neighbourhood attention see, and what a tiled kernel computes.

    On the left the windows of three queries on the map (of a volume: the slice of the query). On the right every
    product of a tile of queries and a tile of keys: white ones are not computed, and the darker one is, the more of it
    is needed.

    Args:
        simulation: What `visattn.attention.simulate` returned.
        path: The picture.

    Raises:
        UserError: If matplotlib is missing, or there are too many tiles to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install 'visattn[report]'") from None
    needed = np.ones((1, 1), dtype=np.float32)
    for axis in range(len(simulation.size)):
        share = simulation.tiles(axis).numpy()
        if max(needed.shape[0] * share.shape[0], needed.shape[1] * share.shape[1]) > _MOST_TILES:
            raise UserError(
                f"more than {_MOST_TILES} tiles are too many to draw: take larger --tile_q and --tile_kv, or a smaller "
                "--size"
            )
        needed = np.kron(needed, share)
    figure = Figure(figsize=(10.5, 5.2), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_windows(left, simulation)
    _draw_products(right, simulation, needed)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _draw_windows(axes: Any, simulation: "Simulation") -> None:
    """Three queries, near one corner, in the middle and at the other corner, each with its keys, in one colour each."""
    size = simulation.size
    shown = (1, *size) if len(size) == 1 else size[-2:]
    picture = np.ones((*shown, 3))
    marks = []
    for share, tint in ((0.08, (0.0, 0.45, 0.70)), (0.5, (0.84, 0.37, 0.0)), (0.93, (0.0, 0.62, 0.45))):
        query = [min(int(share * length), length - 1) for length in size]
        lines = [simulation.line(axis, at).numpy() for axis, at in enumerate(query)]
        seen = lines[-1][None] if len(size) == 1 else lines[-2][:, None] & lines[-1][None]
        for channel in range(3):
            picture[..., channel][seen] *= 0.45 + 0.55 * tint[channel]
        marks.append(((query[-1], 0 if len(size) == 1 else query[-2]), tint))
    axes.imshow(picture, interpolation="nearest", aspect="auto" if len(size) == 1 else "equal")
    for at, tint in marks:
        axes.plot(*at, "s", color=tint, markersize=max(2.5, 150 / max(shown)), markeredgecolor="black")
    if max(shown) <= 64:
        for edges, draw in ((shown[0], axes.axhline), (shown[1], axes.axvline)):
            for edge in range(1, edges):
                draw(edge - 0.5, color=_FAINT, linewidth=0.4)
    if len(size) == 1:
        axes.set_yticks([])
    slices = " (in its slice)" if len(size) == 3 else ""
    axes.set_title(f"Three queries and the keys that each sees{slices}", fontsize=10, loc="left", color=_INK)


def _draw_products(axes: Any, simulation: "Simulation", needed: NDArray[Any]) -> None:
    """Every product of tiles: white where it is not computed, the darker the more of it is needed."""
    from matplotlib.ticker import MaxNLocator

    # The lightest tile that is computed still stands out from the white of those that are not.
    depth = np.where(needed > 0, 0.2 + 0.8 * needed, 0.0)[..., None]
    smooth = "nearest" if max(needed.shape) <= 700 else "antialiased"
    axes.imshow(1 - depth * (1 - np.array([0.03, 0.19, 0.42])), interpolation=smooth, aspect="auto")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    ours, theirs = ("x".join(map(str, tile)) for tile in (simulation.tile_q, simulation.tile_kv))
    axes.set_xlabel(f"tiles of {theirs} keys")
    axes.set_ylabel(f"tiles of {ours} queries")
    waste = f"{simulation.computed / simulation.pairs:.2f}x the products needed"
    title = f"Computed: {100 * (needed > 0).mean():.3g} % of the tiles, {waste};\nthe darker, the more of it is needed"
    axes.set_title(title, fontsize=10, loc="left", color=_INK)
