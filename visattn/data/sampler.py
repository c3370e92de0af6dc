"""Which case stands in which batch: a function of seed, epoch and rank, and of nothing else."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Key(NamedTuple):
    """What the training set is asked for. The epoch rides along because workers hold a copy of the set from before."""

    item: int
    epoch: int = 0
    scale: float = 1.0
    copy: int = 0


class EpochSampler(Sampler[list[Key]]):
    """Yields the training batches of one epoch as lists of keys; use it as a `batch_sampler`.

    The order is a permutation drawn from (seed, epoch). Each run of `batch_size` x `world` cases is one step of all
    devices, so that two devices with half the batch see what one device sees. An incomplete last batch is dropped (the
    next epoch draws another order), unless it is the only one.

    Args:
        length: Number of cases.
        batch_size: Cases per device and step.
        seed: Seed of the run.
        scales: Each batch is yielded once for each of these factors of the image size, each a step of its own.
        rank: This process among `world`.
        world: Number of processes that share the data.
        repeats: Repeated augmentation (Hoffer et al., CVPR 2020): each case stands so many times in a row, as copies
            that are augmented differently, and an epoch of as many steps sees so many times fewer cases. Copies go to
            different devices where there are several, as timm's `RepeatAugSampler` has it.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        scales: Sequence[float] = (1.0,),
        rank: int = 0,
        world: int = 1,
        repeats: int = 1,
    ) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.scales = tuple(scales)
        self.rank = rank
        self.world = world
        self.repeats = repeats
        self.epoch = 0
        self._done = (0, 0)

    def resume(self, epoch: int, batches: int) -> None:
        """Start with `epoch`, and leave out its first `batches`, which were trained on before a stop.

        The epoch is set here because loading processes ask for their first batches before Lightning calls `set_epoch`.
        """
        self.epoch = epoch
        self._done = (epoch, batches)

    @property
    def sampler(self) -> "EpochSampler":
        """Itself: Lightning looks for `set_epoch` on a batch sampler's `sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration draws; Lightning calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, self.length // (self.batch_size * self.world)) * len(self.scales)

    def __iter__(self) -> Iterator[list[Key]]:
        drawn = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        order = np.arange(self.length)  # places in the epoch; the case at a place, and which copy of it, stand in `key`
        step = self.batch_size * self.world
        if self.length < step:
            # Too few for one full step: all devices get equally many, if need be the first cases again.
            share = -(-self.length // self.world)
            batches = [np.resize(order, share * self.world)[self.rank * share : (self.rank + 1) * share]]
        elif self.repeats > 1:
            starts = range(self.rank, self.length // step * step, step)
            batches = [order[start : start + step - self.rank : self.world] for start in starts]
        else:
            starts = range(self.rank * self.batch_size, self.length // step * step, step)
            batches = [order[start : start + self.batch_size] for start in starts]

        def key(place: int, scale: float) -> Key:
            return Key(int(drawn[place // self.repeats]), self.epoch, scale, place % self.repeats)

        steps = [[key(int(place), scale) for place in batch] for batch in batches for scale in self.scales]
        yield from steps[self._done[1] if self.epoch == self._done[0] else 0 :]


class ShardSampler(Sampler[list[int]]):
    """Yields each case once in all, and equally many batches on every device, so that no device waits for another.

    Nothing is repeated to fill up; batches may differ in size by one. That needs at least one case per device, and
    where `batch_size` is 1 some batches hold 2.

    Args:
        length: Number of cases, at least `world`.
        batch_size: The most cases in a batch.
        rank: This process among `world`.
        world: Number of processes that share the data.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.batches = min(-(-length // (batch_size * world)), length // world)
        self.mine = np.arange(rank, length, world)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        for batch in np.array_split(self.mine, self.batches):
            yield [int(index) for index in batch]
