"""From a batch of prepared images to probabilities at each image's own size: pure functions over a callable.

Logits, not probabilities, are resized: the zero crossing of an interpolated logit map is the smoother contour, and it
is what PraNet's test code does. Training validates with the same function that `visattn predict` uses.

Shapes: B images, C input channels, K output channels, h x w the network's size, H x W an image's own size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from visattn.errors import unknown

Activation = Literal["sigmoid", "softmax"]
TestTimeAugmentation = Literal["none", "flips"]

TTA: dict[str, tuple[tuple[int, ...], ...]] = {
    "none": ((),),
    "flips": ((), (-1,), (-2,), (-2, -1)),
}
"""Name to the views that are averaged, each a tuple of the axes it is flipped along."""


def predict_probabilities(
    network: Callable[[Tensor], Any],
    images: Tensor,
    sizes: Sequence[tuple[int, int] | torch.Size],
    activation: Activation,
    tta: TestTimeAugmentation = "none",
) -> list[NDArray[np.float32]]:
    """Probabilities of a batch, each at its own image's size.

    Args:
        network: (B, C, h, w) to logits (B, K, h, w), or to a tuple of such maps, the prediction first. A module must be
            in eval mode.
        images: (B, C, h, w), on the network's device.
        sizes: Height and width in pixels of the B results.
        activation: `sigmoid` for independent channels, `softmax` for classes that exclude each other.
        tta: `flips` averages the probabilities of the image and its three mirror images.

    Returns:
        B arrays (K, H, W) of 0..1, on the CPU.
    """
    return list(iter_probabilities(network, images, sizes, activation, tta))


@torch.no_grad()
def iter_probabilities(
    network: Callable[[Tensor], Any],
    images: Tensor,
    sizes: Sequence[tuple[int, int] | torch.Size],
    activation: Activation,
    tta: TestTimeAugmentation = "none",
) -> Iterator[NDArray[np.float32]]:
    """As `predict_probabilities`, one image at a time, so that only one large result need be held."""
    if isinstance(network, nn.Module) and network.training:
        raise ValueError("the network is in training mode: batch statistics would mix the images; call eval() first")
    if len(sizes) != len(images):
        raise ValueError(f"{len(images)} images, but {len(sizes)} sizes")
    if tta not in TTA:
        raise unknown("tta", tta, TTA)
    views = []
    for axes in TTA[tta]:
        output = network(images.flip(axes) if axes else images)
        logits: Tensor = output[0] if isinstance(output, tuple | list) else output
        # float(): under bf16 the resize would round; flipping back is exact, since the resize is symmetric.
        views.append((logits.flip(axes) if axes else logits).float())  # (B, K, h, w)
    for index, size in enumerate(sizes):
        mean: Tensor | None = None
        for logits in views:
            native = F.interpolate(logits[index : index + 1], tuple(size), mode="bilinear", align_corners=False)
            probability = native.sigmoid() if activation == "sigmoid" else native.softmax(dim=1)  # (1, K, H, W)
            mean = probability if mean is None else mean + probability
        assert mean is not None
        yield (mean[0] / len(views)).cpu().numpy()
