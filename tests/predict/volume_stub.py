"""A network for volumes whose masks can be worked out by hand, and the files that tests need around it.

Run as a program it predicts in a process of its own and prints its peak memory:
volume_stub.py CHECKPOINT OUTPUT INPUT [key=value ...]
With `serve` behind these it imports everything once. For each line that it reads it predicts in a fork, from the
beginning if the line is `again`; at the next line it kills the fork and prints how that ended.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

from visattn.checkpoint import KEY, checkpoint_metadata
from visattn.data.intensity import Normalise
from visattn.data.volume_preprocessing import VolumePreprocessing
from visattn.labels import Labels
from visattn.memory import peak_bytes


class Levels(nn.Module):
    """Class k of K where the first channel is near k / (K - 1); one class: 20 (x - 0.5). A tilt breaks its symmetry."""

    def __init__(self, in_channels=1, classes=1, pretrained=False, tilt=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0, 1, classes))
        self.tilt = tilt

    def forward(self, x):
        first = x[:, :1] + self.tilt * torch.linspace(0, 1, x.shape[-1], device=x.device)
        if len(self.weight) == 1:
            return (first - 0.5) * 20 + self.weight
        return -40 * (first - self.weight.view(1, -1, 1, 1, 1)).abs()


def create_model(name, activation=None, **kwargs):
    return Levels(**kwargs)


def write_checkpoint(path, labels=None, channels=("t1",), shift=0.0, tilt=0.0, regions=None, steps=(), **preprocessing):
    label_map = Labels.from_config(labels or {"background": 0, "lesion": 5}, regions)
    options = {"patch": (8, 8, 8), "orientation": "RAS"} | preprocessing
    prepared = VolumePreprocessing(tuple(channels), tuple(Normalise("none") for _ in channels), **options)
    network = Levels(classes=label_map.channels)
    with torch.no_grad():
        network.weight.add_(shift)
    content = checkpoint_metadata(
        recipe={"seed_everything": 0},
        labels=label_map.to_config(),
        preprocessing=prepared.to_config(),
        network={"name": "levels", "in_channels": len(channels), "classes": label_map.channels, "tilt": tilt},
        data={"description": "phantom (embedded, synthetic)", "fingerprint": "00"},
        steps=steps,
    )
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": state, KEY: content}, path)
    return path


def main():
    import visattn.networks

    visattn.networks.create_model = create_model
    from visattn.predict_volumes import predict_volumes

    checkpoint, output, given, *rest = sys.argv[1:]
    options = {key: int(value) for key, value in (pair.split("=") for pair in rest if pair != "serve")}
    if "serve" in rest:
        while line := sys.stdin.readline():
            child = os.fork()
            if not child:
                try:
                    os._exit(predict_volumes([Path(given)], checkpoint, output, **options, overwrite="again" in line))
                finally:
                    os._exit(99)
            print("ready", flush=True)
            sys.stdin.readline()
            os.kill(child, signal.SIGKILL)  # not waited for yet, so the number is its own even if it has ended
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        return
    print("ready", flush=True)
    code = predict_volumes([Path(given)], checkpoint, output, **options)
    print(peak_bytes() >> 20)
    sys.exit(code)


if __name__ == "__main__":
    main()
