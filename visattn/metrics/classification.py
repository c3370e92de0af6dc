"""The answers of a classifier as a torchmetrics metric: a batch at a time, on any number of processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from visattn.class_labels import ClassLabels
from visattn.metrics.classes import ClassTable
from visattn.metrics.collected import CaseMetric


class ClassificationMetrics(CaseMetric):
    """Collects probabilities and true classes of cases; `table` computes from all of them.

    Args:
        labels: The classes.
        **kwargs: Of `torchmetrics.Metric`.
    """

    records: list[Tensor]

    def __init__(self, labels: ClassLabels, **kwargs: Any) -> None:
        super().__init__("records", **kwargs)
        self.labels = labels

    def update(self, cases: Sequence[str], probabilities: Tensor, truth: Tensor, groups: Sequence[str]) -> None:
        """Add a batch.

        Args:
            cases: Names, unique in the data set together with their groups; a second one is not counted.
            probabilities: (B, K) in 0..1.
            truth: True class (B,), or which classes are true (B, K).
            groups: What each case belongs to.
        """
        values = probabilities.detach().double().cpu().numpy()
        true = truth.detach().long().cpu().numpy().reshape(len(values), -1)
        records = np.concatenate([np.ascontiguousarray(values).view(np.int64), true], axis=1)
        for case, group in zip(cases, groups, strict=True):
            self.add_name(case, group)
        self.records.append(torch.from_numpy(records.ravel()).to(self.device))

    def compute(self) -> dict[str, float]:
        """AUC and accuracy over all cases of all processes."""
        return self._table()[1].headline()

    def table(self) -> tuple[list[tuple[str, str]], ClassTable]:
        """Name and group of each case of all processes, each of which has to call this, and what was made of them.

        Cases come in the order of their names, whatever the number of processes.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn):
            return self._table()

    def _table(self) -> tuple[list[tuple[str, str]], ClassTable]:
        keys, once = self.keys()
        classes = self.labels.channels
        width = classes + (classes if self.labels.multi_label else 1)
        records: NDArray[np.int64] = dim_zero_cat(self.records).cpu().numpy().reshape(len(keys), width)
        names = sorted(once)
        records = np.ascontiguousarray(records[[once[key] for key in names]])
        probabilities = np.ascontiguousarray(records[:, :classes]).view(np.float64)
        truth = records[:, classes:] if self.labels.multi_label else records[:, classes]
        groups = tuple(group or case for case, group in names)
        return names, ClassTable(self.labels.names, probabilities, truth, groups)
