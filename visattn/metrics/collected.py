"""A torchmetrics metric that keeps what belongs to each case, on any number of processes."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class CaseMetric(Metric):
    """Keeps the names of cases; every case's own values travel between processes, not sums.

    So a case which a distributed sampler repeated to fill its last batch counts once: cases are told apart by name and
    group together. All processes get the same result. The states are flat integer tensors, which every backend can
    gather at any length: names as UTF-8 bytes, numbers as the bits of float64, since not every device has that type.

    Args:
        records: Names of the further states, flat int64 tensors.
        **kwargs: Of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    names: list[Tensor]

    def __init__(self, *records: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._records = records
        for state in ("names", *records):
            self.add_state(state, [], dist_reduce_fx="cat")
        self._add_empty()

    def reset(self) -> None:
        """Forget all cases."""
        super().reset()
        self._add_empty()

    def add_name(self, case: str, group: str) -> None:
        """Note that what is added to the other states next belongs to this case."""
        text = f"{case}\0{group}\0".encode("utf-8", "surrogateescape")
        self.names.append(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device))

    def keys(self) -> tuple[list[tuple[str, str]], dict[tuple[str, str], int]]:
        """Name and group of each entry, and for each of them the number of its first entry: a repetition is no case."""
        joined = bytes(dim_zero_cat(self.names).cpu().numpy()).decode("utf-8", "surrogateescape")
        texts = joined.split("\0")[:-1]
        keys = list(zip(texts[::2], texts[1::2], strict=True))
        return keys, {key: index for index, key in reversed(list(enumerate(keys)))}

    def _add_empty(self) -> None:
        # torchmetrics gathers a float tensor from a process that saw no case, which the others' integers cannot join.
        self.names.append(torch.empty(0, dtype=torch.uint8, device=self.device))
        for state in self._records:
            getattr(self, state).append(torch.empty(0, dtype=torch.int64, device=self.device))
