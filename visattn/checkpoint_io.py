"""How Lightning writes and reads checkpoints here: whole or not at all, and never anything that can execute."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from visattn.checkpoint import load_plain
from visattn.errors import UserError
from visattn.files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin over local files: `Trainer(plugins=[AtomicCheckpointIO()])`.

    Writing goes to a temporary file that is synced and renamed, so that a killed process or a full disk leaves the
    previous checkpoint whole. Reading is `weights_only=True` whatever the caller asks.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            TypeError: `storage_options` is given; local files have none.
            UserError: the disk is full or read-only.
        """
        if storage_options is not None:
            raise TypeError("storage_options: checkpoints are local files")
        # A handle, not the path: torch would put the temporary's random name into the archive, and equal content
        # would give unequal files.
        try:
            with atomic_write(path) as temporary, temporary.open("wb") as handle:
                torch.save(checkpoint, handle)
        except (OSError, RuntimeError) as error:  # torch hides a full disk in a RuntimeError
            causes = (error, error.__cause__, error.__context__)
            reason = next((cause.strerror for cause in causes if isinstance(cause, OSError)), "the disk may be full")
            free = shutil.disk_usage(Path(path).parent).free
            raise UserError(
                f"{path}: the checkpoint cannot be written: {reason} ({free / 1e6:.0f} MB free).\n"
                "If there was one before, it is whole. Free space, then continue with --ckpt_path last and --run."
            ) from error

    @override
    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint's content.

        Raises:
            UserError: the file is missing, damaged, or holds more than tensors and plain values.
        """
        content: dict[str, Any] = load_plain(Path(path), map_location)
        return content
