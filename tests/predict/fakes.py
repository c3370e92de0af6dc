"""A network whose masks can be worked out by hand, and the files that tests of `predict` need around it."""

import csv
import json

import numpy as np
import torch
from PIL import Image
from torch import nn

from visattn.checkpoint import KEY, checkpoint_metadata
from visattn.labels import Labels

SIZE = 16


class Bright(nn.Module):
    """Logits that can be worked out by hand: class k of K from the red channel r in 0..1.

    One class: 20 (r - 0.5). Several: -40 |r - k / (K - 1)|.
    """

    def __init__(self, in_channels=3, classes=1, pretrained=False):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 1, classes))

    def forward(self, x):
        red = x[:, :1]
        if len(self.weight) == 1:
            return (red - 0.5) * 20 + self.weight, red  # a second output, as side maps
        return -40 * (red - self.weight.view(1, -1, 1, 1)).abs()


def create_model(name, **kwargs):
    return Bright(**kwargs)


def write_checkpoint(path, labels=None, shift=0.0, threshold=0.5, size=SIZE, **blocks):
    label_map = Labels.from_config(labels or {"background": 0, "polyp": 255}, **blocks)
    network = Bright(classes=label_map.channels)
    with torch.no_grad():
        if label_map.channels == 1:
            network.weight.fill_(shift)
        else:
            network.weight.add_(shift)
    content = checkpoint_metadata(
        recipe={"seed_everything": 0},
        labels=label_map.to_config(),
        preprocessing={"size": [size, size], "mean": [0.0] * 3, "std": [1.0] * 3, "channels": 3},
        network={"name": "bright", "in_channels": 3, "classes": label_map.channels},
        data={"description": "phantom (embedded, synthetic)", "fingerprint": "00"},
        threshold=threshold,
    )
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, KEY: content}, path)
    return path


def save_image(path, array=None, seed=0, size=(SIZE, SIZE), **options):
    if array is None:
        array = blocks(seed, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb = np.stack([array, np.zeros_like(array), np.zeros_like(array)], axis=-1)
    Image.fromarray(rgb).save(path, **options)
    return array


def blocks(seed, size=(SIZE, SIZE)):
    """0 or 255 in 4 x 4 blocks."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 2, (-(-size[0] // 4), -(-size[1] // 4)))
    return (coarse.repeat(4, 0).repeat(4, 1)[: size[0], : size[1]] * 255).astype(np.uint8)


def mask(path):
    with Image.open(path) as image:
        return np.asarray(image)


def rows(output):
    with (output / "predictions.csv").open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def manifest(output):
    return json.loads((output / "manifest.json").read_text())


def tree(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
