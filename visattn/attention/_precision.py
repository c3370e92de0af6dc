"""Where a softmax needs more digits than the surrounding half precision gives."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A context in which products keep the dtype of their operands.

    Under autocast a product of float32 operands is otherwise computed in half precision again, where large logits
    become infinite and their softmax NaN.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
