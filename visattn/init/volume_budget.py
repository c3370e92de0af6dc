"""How large a window of a volume, how many at once and how long: what a machine can pay.

Measured as for images (`visattn.init.budget`): bytes kept for the backward pass, processor time of training steps with
one thread, and steps of the hippocampus recipe on an H200.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visattn.init.budget import CPU_SECONDS, Network, cpu_speed, duration, gpu_room
from visattn.init.composed import Wanted, network_for
from visattn.init.machine import Machine
from visattn.init.volume_grid import Levels, Size3, plan_patch
from visattn.labels import Labels

_MOST_VOXELS = {"cpu": 64**3, "gpu": 128**3}  # of a patch; larger ones see hardly more that helps
_MOST_BATCH = 12
_MOST_STEP = 4.5e6  # voxels of a step, by which time is bounded where memory is not
_CPU_VOLUME = 2e6  # voxels of a typical volume that a CPU scores in a second or two
_FEWEST_STEPS, _MOST_STEPS = 6000, 25_000
_CPU_STEPS = 600  # what a patch has to leave room for in the time
_SHARE_SEEN = 0.1  # of all voxels in a step, beyond which batches become more alike than they should
_HALF = 0.6  # of the bytes of float32 that a step in 16 bits keeps
_CPU_MEMORY = 0.4  # of the machine's
_GPU_SECONDS = (0.03, 0.1)  # a step on an H200: fixed, and for each million voxels
_FORWARD = 0.35  # of a step's time that a prediction costs
_WINDOWS = 8  # that a volume larger than the patch is seen in for each patch that it holds: half overlap on each axis
_VALIDATION_SHARE = 0.25  # of the time of training that validation may take


@dataclass(frozen=True)
class VolumeBudget:
    """What fits.

    Args:
        network: What is trained.
        patch: The window, voxels along R, A, S.
        batch: Patches in a step.
        iterations: Steps in an epoch.
        epochs: Epochs.
        validate_every: Epochs between validations.
        seconds: Time of it all, roughly.
        why: For patch, batch, epochs and validation, what decided.
    """

    network: Network
    patch: Size3
    batch: int
    iterations: int
    epochs: int
    validate_every: int
    seconds: float
    why: dict[str, str]


def plan_volume_budget(
    labels: Labels,
    machine: Machine,
    sizes: NDArray[np.float64],
    spacing: Sequence[float],
    training: int,
    validation: int,
    channels: int = 1,
    wanted: Wanted | None = None,
) -> VolumeBudget:
    """Choose network, patch, batch and length.

    Args:
        labels: What is learned.
        machine: Where.
        sizes: Voxels of each volume at `spacing`, (cases, 3).
        spacing: Voxel size in mm.
        training: Number of training cases.
        validation: Number of validation cases.
        channels: Of the volumes.
        wanted: What network the user asks for.
    """
    cpu = machine.device == "cpu"
    typical = np.median(sizes, axis=0)
    most = _MOST_VOXELS["cpu" if cpu else "gpu"]

    def fits(patch: Size3, levels: Levels) -> bool:
        network = network_for(labels, machine, channels, levels, wanted)
        voxels = int(np.prod(patch))
        slow = cpu and _CPU_STEPS * _step(network, machine, 2 * voxels) > CPU_SECONDS
        return voxels <= most and 2 * voxels <= _room(network, machine) and not slow

    patch, levels = plan_patch(typical.tolist(), spacing, fits)
    network = network_for(labels, machine, channels, levels, wanted)
    voxels = int(np.prod(patch))
    room = max(2, int(_room(network, machine) // voxels))
    worth = max(2, round(_SHARE_SEEN * training * float(np.prod(typical)) / voxels))
    batch = min(room, worth, max(2, min(4 if cpu else _MOST_BATCH, int(_MOST_STEP // voxels))))
    step = _step(network, machine, batch * voxels)
    windows = float(np.maximum(1, _WINDOWS * np.prod(sizes, axis=1) / voxels).mean())
    windows = 1.0 if (sizes <= np.array(patch)).all() else windows
    check = validation * (windows * _FORWARD * step / batch + 0.5 * float(np.prod(typical)) / 4e6)
    steps = min(max(60 * training, _FEWEST_STEPS), _MOST_STEPS)
    if cpu:
        steps = min(2000, max(20, int(CPU_SECONDS * (1 - _VALIDATION_SHARE) / step)))
    iterations = min(50 if cpu else 100, steps)
    epochs = max(1, round(steps / iterations))
    every = min(max(1, round(check / (_VALIDATION_SHARE * iterations * step))), max(1, epochs // 5))
    seconds = epochs * iterations * step + (epochs // every + 1) * check
    why = {
        "patch": _patch_reason(patch, typical, machine, most),
        "batch": f"each patch takes about {network.pixel_bytes * _half(machine) * voxels / 1e6:,.0f} MB"
        + ("" if batch == room else f"; more than {batch} would be much of the {training} training cases at once"
           if batch == worth else "; more gains little"),
        "epochs": f"{epochs} x {iterations} = {epochs * iterations} steps, about {duration(seconds)}",
        "validation": f"scoring {validation} whole volumes takes about {duration(check)}",
    }  # fmt: skip
    return VolumeBudget(network, patch, batch, iterations, epochs, every, seconds, why)


def affordable_spacing(machine: Machine, sizes: NDArray[np.float64], spacing: Sequence[float]) -> list[float]:
    """`spacing`, coarser on a CPU where volumes are too large for it: the finest axes first."""
    extent = np.median(sizes, axis=0) * np.array(spacing)
    coarse = np.array(spacing, np.float64)
    step = float(coarse.min())
    while machine.device == "cpu" and float(np.prod(extent / coarse)) > _CPU_VOLUME:
        step *= 1.05
        coarse = np.maximum(coarse, float(f"{step:.2g}"))
    return [float(mm) for mm in coarse]


def _room(network: Network, machine: Machine) -> float:
    """Voxels of all patches of a step that memory holds."""
    free = _CPU_MEMORY * machine.memory if machine.device == "cpu" else gpu_room(network, machine)
    return free / (network.pixel_bytes * _half(machine))


def _half(machine: Machine) -> float:
    return 1.0 if machine.precision == "32-true" else _HALF


def _step(network: Network, machine: Machine, voxels: int) -> float:
    """Seconds of a training step."""
    if machine.device == "cpu":
        return (network.seconds[0] + network.seconds[1] * voxels / 1e6) / cpu_speed(machine)
    return _GPU_SECONDS[0] + _GPU_SECONDS[1] * voxels / 1e6


def _patch_reason(patch: Size3, typical: NDArray[np.float64], machine: Machine, most: int) -> str:
    shown = " x ".join(f"{n:.0f}" for n in typical)
    if all(n >= whole for n, whole in zip(patch, typical, strict=True)):
        return f"holds a typical volume, {shown} voxels"
    # The next larger one would be too large for one of these.
    if 2 * np.prod(patch) > 0.8 * most:
        limit = "more gains little"
    elif machine.device == "cpu":
        limit = f"more takes long on {machine.described}"
    else:
        limit = f"more does not fit twice into {machine.gpu_memory_text}"
    return f"of {shown} voxels in a typical volume; {limit}; a cube in mm, as far as volumes reach"
