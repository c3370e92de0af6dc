"""How large, how many at once and how long: what a network costs, and what a machine can pay.

Memory and time were measured for the networks that `choose_network` picks: bytes kept for the backward pass by hooks on
the saved tensors (an H200 took 2 % more than that in float32, and 60 % of it in bfloat16), processor time of training
steps with one thread, and steps on an H200.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from visattn.class_labels import ClassLabels
from visattn.init.machine import Machine
from visattn.init.volume_grid import Levels
from visattn.labels import Labels

MULTIPLE = 32  # the coarsest maps of the backbones are 32 times smaller than the image
SMALLEST = 64
BATCH = 16  # what the learning rate of 5e-4 was tried with
CPU_SECONDS = 30 * 60.0

_CPU_SIDE = 512
_GPU_SIDES = ((16e9, 512), (0.0, 352))  # from this memory on, the longest side of a square worth its time
_USED = 0.8  # share of the GPU's memory to plan for; the rest is for the workspace of convolutions and for others
_RESERVE = 1.5e9  # bytes that CUDA and its libraries take before the first image
_STATE = 16  # bytes a parameter: weight, gradient and the two moments of Adam
_EXTRA_CORE = 0.75  # what each core after the first adds
_MOST_CORES = 8
_VALIDATION = (0.02, 0.35)  # seconds an image for the metrics, and the share of a training step that a prediction costs
ONLY = "the network takes no other size"
_GPU_SECONDS = (0.1, 0.07)  # a step on an H200 that other runs share: fixed, and for each megapixel of the batch


@dataclass(frozen=True)
class Network:
    """A network with what it costs.

    Args:
        title: Its name for people.
        arguments: The recipe's `network` block.
        why: Why this one.
        parameters: Number of parameters.
        pixel_bytes: Memory for each pixel of an image, or voxel of a volume, in training, in bytes.
        seconds: Time of one image in training on one core: fixed, and for each megapixel or million voxels.
        multiple: What sides of images must be multiples of, or the network pads them.
        smallest: The shortest side that it does not pad.
        only: Side of the only square that it takes; None: it takes any size.
    """

    title: str
    arguments: dict[str, Any]
    why: str
    parameters: float
    pixel_bytes: float
    seconds: tuple[float, float]
    multiple: int = MULTIPLE
    smallest: int = SMALLEST
    only: int | None = None


@dataclass(frozen=True)
class Budget:
    """What fits.

    Args:
        size: Height and width for the network, which it does not pad.
        batch: Images in a step.
        accumulate: Steps whose gradients are added up before the weights change.
        epochs: Passes over the training images.
        seconds: The time that this takes, roughly.
        why: For size, batch and epochs, what decided.
    """

    size: tuple[int, int]
    batch: int
    accumulate: int
    epochs: int
    seconds: float
    why: dict[str, str] = field(default_factory=dict)


def choose_network(
    labels: Labels | ClassLabels, machine: Machine, levels: Levels | None = None, rank: int = 2
) -> Network:
    """The network for these labels on this machine; the one place that decides it.

    Args:
        labels: The labels; those of a classification ask for a classifier.
        machine: The machine.
        levels: How a network that segments volumes goes down; None: for images.
        rank: Of a classifier: 2 for images, 3 for volumes.
    """
    if isinstance(labels, ClassLabels):
        return _classifier(machine, rank)
    if levels is not None:
        narrow = machine.device == "cpu"
        why = "narrow, as a CPU is slow; [32, 64, ...] on a GPU" if narrow else "the baseline that others have to beat"
        return _unet3d(levels, *((8, 128) if narrow else (32, 320)), why)
    classes = 52.0 * (labels.channels - 1)  # bytes that one more output channel costs a pixel
    if machine.device == "cpu":
        arguments = {"name": "pranet", "backbone": "resnet18", "pretrained": False}
        why = "resnet18 takes a third of the time of res2net50d, the paper's backbone, which suits a GPU"
        return Network("PraNet", arguments, why, 17.1e6, 700 + classes, (0.045, 3.6))
    arguments = {"name": "pranet", "backbone": "res2net50d", "pretrained": False}
    return Network("PraNet", arguments, "the paper's backbone", 30.5e6, 2660 + classes, (0.08, 12.2))


def _classifier(machine: Machine, rank: int) -> Network:
    """A classifier of images or volumes."""
    if rank == 2:
        why = "the baseline that others have to beat; pretrained: true (a download) helps small sets"
        return Network("ResNet-18", {"name": "resnet18", "pretrained": False}, why, 11.2e6, 450, (0.015, 2.2))
    if machine.device == "cpu":
        arguments = {"name": "va_pyramid3d_tiny", "pretrained": False}
        return Network("3-D pyramid (tiny)", arguments, "tiny, as a CPU is slow", 0.6e6, 220, (0.015, 1.0))
    arguments = {"name": "va_pyramid3d_small", "pretrained": False, "drop_path_rate": 0.1}
    why = "attention: names another mechanism, as neighborhood"
    return Network("3-D pyramid (small)", arguments, why, 3.3e6, 780, (0.02, 3.8))


def _unet3d(levels: Levels, first: int, most: int, why: str) -> Network:
    """A plain U-Net and what it costs, for each voxel of the image."""
    filters = [min(first * 2**level, most) for level in range(len(levels.kernels))]
    arguments: dict[str, Any] = {"name": "unet3d", "filters": filters, "deep_supervision": len(filters) > 3}
    if not levels.plain:
        arguments |= {"strides": [list(one) for one in levels.strides], "kernels": [list(k) for k in levels.kernels]}
    kept = parameters = products = 0.0
    share, before = 1.0, 1
    for level, (width, kernel) in enumerate(zip(filters, levels.kernels, strict=True)):
        last = level == len(filters) - 1
        weights = math.prod(kernel) * (before * width + width**2 + (0 if last else 3 * width**2))
        parameters += weights
        products += share * weights
        kept += share * width
        if not last:
            parameters += filters[level + 1] * width * math.prod(levels.strides[level])
            share, before = share / math.prod(levels.strides[level]), width
    seconds = 1.2 + 5e-5 * products + 0.06 * kept  # the first for augmentation and what else costs the same for all
    return Network("U-Net", arguments, why, parameters, 48 * kept, (0.02, seconds))


def plan_budget(
    network: Network,
    machine: Machine,
    sizes: Sequence[tuple[int, int]],
    training: int,
    validation: int,
    only: int | None = None,
) -> Budget:
    """Choose size, batch and epochs.

    Args:
        network: What is to be trained.
        machine: Where.
        sizes: Height and width of every image.
        training: Number of training images.
        validation: Number of validation images.
        only: As the network's, where a classifier's is known here alone.
    """
    only = only or network.only
    # Four steps an epoch at least, but no batch so small that its norms are noise, unless the data set is.
    wanted = min(BATCH, max(4 if training >= 8 else 2, _power(training // 4)))
    native, aspect, shape = _shape([(only, only)] if only else sizes)
    if machine.device == "cpu":
        return _cpu_budget(network, machine, sizes, wanted, training, validation, only)
    room = gpu_room(network, machine)
    cap = next(side for least, side in _GPU_SIDES if machine.gpu_memory >= least)
    for side in [only] if only else _sides(min(native, cap), network):
        size = (only, only) if only else _size(side, aspect, network)
        image = network.pixel_bytes * size[0] * size[1]
        fits = int(room / image)
        if fits >= min(wanted, 4):
            break
    batch = min(wanted, max(2, _power(fits)))
    limit = f"{cap} x {cap} is enough to begin with" if side >= cap else f"no more fits into {machine.gpu_memory_text}"
    accumulate = wanted // batch
    passes = min(max(150 * training, 1500 * wanted), 200_000)
    epochs = min(max(_whole(passes / training), 5), 300)
    image_seconds = _GPU_SECONDS[0] / batch + _GPU_SECONDS[1] * size[0] * size[1] / 1e6
    seconds = epochs * (training * image_seconds + validation * (_VALIDATION[1] * image_seconds + _VALIDATION[0]))
    why = {
        "size": ONLY if only else _size_reason(native, shape, limit, side, network),
        "batch": f"what fits into {machine.gpu_memory_text}" if batch < wanted else _batch_reason(batch, training),
        "epochs": f"{epochs * training} images seen in all, {_steps(epochs, training, batch, accumulate)} steps",
    }
    why["batch"] += f"; each image takes about {image / 1e6:.0f} MB"
    return Budget(size, batch, accumulate, epochs, seconds, why)


def _cpu_budget(
    network: Network,
    machine: Machine,
    sizes: Sequence[tuple[int, int]],
    batch: int,
    training: int,
    validation: int,
    only: int | None,
) -> Budget:
    native, aspect, shape = _shape([(only, only)] if only else sizes)
    speed = cpu_speed(machine)
    epochs = min(_whole(min(max(60 * training, 500 * batch), 24_000) / training), 200)

    def seconds(size: tuple[int, int]) -> float:
        step = network.seconds[0] + network.seconds[1] * size[0] * size[1] / 1e6
        return (training * step + validation * (_VALIDATION[1] * step + _VALIDATION[0])) / speed

    for side in [only] if only else _sides(min(native, _CPU_SIDE), network):
        size = (only, only) if only else _size(side, aspect, network)
        if epochs * seconds(size) <= CPU_SECONDS or side <= 96:
            break
    affordable = max(1, int(CPU_SECONDS / seconds(size)))
    enough = "enough for a first result" if affordable >= epochs else "what this machine can do in that time"
    epochs = min(epochs, affordable)
    if side >= _CPU_SIDE:
        limit = f"{_CPU_SIDE} x {_CPU_SIDE} is enough to begin with"
    else:
        limit = f"more takes long on {machine.described}; thin or small things need a GPU"
    why = {
        "size": ONLY if only else _size_reason(native, shape, limit, side, network),
        "batch": _batch_reason(batch, training),
        "epochs": f"about {duration(epochs * seconds(size))}, {_steps(epochs, training, batch, 1)} steps: {enough}",
    }
    return Budget(size, batch, 1, epochs, epochs * seconds(size), why)


def gpu_room(network: Network, machine: Machine) -> float:
    """Bytes for images on the GPU, once the network is there."""
    return _USED * machine.gpu_memory - _RESERVE - _STATE * network.parameters


def cpu_speed(machine: Machine) -> float:
    """How much faster than one core all are."""
    return 1 + _EXTRA_CORE * (min(machine.cores, _MOST_CORES) - 1)


def duration(seconds: float) -> str:
    """A rough time in words."""
    if seconds < 90:
        return "a minute"
    if seconds < 10 * 60:
        return f"{round(seconds / 60)} minutes"
    if seconds < 100 * 60:
        return f"{5 * round(seconds / 300)} minutes"
    return f"{seconds / 3600:.0f} hours"


def _shape(sizes: Sequence[tuple[int, int]]) -> tuple[float, float, str]:
    """The side of a square as large as the median image, the width over height to train at, and why that."""
    areas = sorted(height * width for height, width in sizes)
    aspects = sorted(width / height for height, width in sizes)
    side, middle = math.sqrt(areas[len(areas) // 2]), aspects[len(aspects) // 2]
    # Images of several shapes are all bent to one; a square bends the fewest of them far.
    if aspects[-1] / aspects[0] > 1.05 and 2 / 3 < middle < 3 / 2:
        return side, 1.0, "a square, because the images differ in shape"
    return side, 1.0 if 0.9 < middle < 1.1 else middle, "the images' shape"


def _sides(start: float, network: Network) -> range:
    return range(_round(start, network), network.smallest - 1, -network.multiple)


def _size(side: float, aspect: float, network: Network) -> tuple[int, int]:
    return _round(side / math.sqrt(aspect), network), _round(side * math.sqrt(aspect), network)


def _whole(epochs: float) -> int:
    """A round number of epochs, at least 1."""
    return max(1, 5 * round(epochs / 5) if epochs > 20 else round(epochs))


def _power(number: int) -> int:
    """The largest power of two up to `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1) if number > 0 else 1


def _round(side: float, network: Network) -> int:
    """The side nearest to `side` that the network does not pad."""
    return max(network.smallest, network.multiple * math.floor(side / network.multiple + 0.5))


def _steps(epochs: int, training: int, batch: int, accumulate: int) -> int:
    return epochs * max(1, training // batch // accumulate)


def _size_reason(native: float, shape: str, limit: str, side: int, network: Network) -> str:
    if native < side - network.multiple / 2:
        return f"the least that the network does not pad; half of the images have less; {shape}"
    if side >= native - network.multiple / 2:
        return f"about as large as the images; {shape}"
    return f"half of the images have more than {native:.0f} x {native:.0f} pixels, but {limit}; {shape}"


def _batch_reason(batch: int, training: int) -> str:
    if batch == BATCH:
        return "what the learning rate was tried with"
    steps = max(1, training // batch)
    return f"leaves {steps} step{'s' if steps > 1 else ''} in each epoch of {training} images"
