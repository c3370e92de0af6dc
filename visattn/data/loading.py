"""What all data modules share: their loaders, this process among others, and where training goes on after a stop."""

import os
import sys
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from visattn.signals import leave_signals_to_parent


def rank() -> tuple[int, int]:
    """This process and the number of processes that share the data."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def free_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress(trainer: Any) -> dict[str, Any]:
    """The epoch and the number of its batches after which training goes on, for the checkpoint."""
    loop = trainer.fit_loop if trainer is not None else None
    if loop is None:
        return {}
    epoch: Any = loop.epoch_progress.current
    within = epoch.ready != epoch.processed  # else the batches counted are those of the epoch before
    return {"epoch": epoch.processed, "batches": loop.epoch_loop.batch_progress.current.completed if within else 0}


def make_loader(data: Any, sampler: Any, collate: Any, workers: int, seed: int, pin: bool = True) -> DataLoader[Any]:
    """A loader of the batches that `sampler` lists."""
    return DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin and torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # fork shares the cached images; other ways of starting would copy them into every worker.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator().manual_seed(seed),  # its own, so that loading leaves torch's stream alone
    )


def _start_worker(worker: int) -> None:
    """OpenCV's threads do not survive a fork, and one process per core is enough."""
    cv2.setNumThreads(0)
    leave_signals_to_parent()
