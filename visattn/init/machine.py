"""What this machine can train: cores, memory, GPU. torch is imported only where there is something to ask it."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["32-true", "16-mixed", "bf16-mixed"]

_DRIVERS = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, and either under Windows' Linux


@dataclass(frozen=True)
class Machine:
    """What training can use.

    Args:
        cores: Processor cores that this process may use.
        memory: Main memory in bytes.
        device: cpu, cuda or mps.
        gpu: Name of the first GPU, or empty.
        gpu_memory: Its memory in bytes, all of it, whoever uses it now; 0 without a GPU.
        gpus: Number of GPUs.
        precision: The fastest arithmetic that trains well on the device.
    """

    cores: int
    memory: int
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    gpu: str = ""
    gpu_memory: int = 0
    gpus: int = 0
    precision: Precision = "32-true"

    @property
    def gpu_memory_text(self) -> str:
        """The GPU's memory in words."""
        return f"{self.gpu_memory / 2**30:.0f} GB"

    @property
    def described(self) -> str:
        """The machine in words."""
        cores = f"{self.cores} processor core{'s' if self.cores > 1 else ''}"
        if self.device == "cpu":
            return f"{cores}, no GPU"
        several = f" (the first of {self.gpus})" if self.gpus > 1 else ""
        return f"{self.gpu} with {self.gpu_memory_text}{several}, {cores}"


def this_machine() -> Machine:
    """Look at the machine that this process runs on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if not apple and not shutil.which("nvidia-smi") and not any(Path(driver).exists() for driver in _DRIVERS):
        return Machine(cores, memory)  # the common case without a GPU, in a moment
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        # bfloat16 is fast from Ampere (8.0) on, float16 from Volta (7.0) on.
        precision: Precision = (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False)
            else "16-mixed" if found.major >= 7 else "32-true"
        )  # fmt: skip
        return Machine(cores, memory, "cuda", found.name, int(found.total_memory), torch.cuda.device_count(), precision)
    if torch.backends.mps.is_available():
        # Processor and GPU share the memory; a run that takes half of it leaves the machine usable.
        return Machine(cores, memory, "mps", "Apple GPU", memory // 2, 1)
    return Machine(cores, memory)
