import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.data.sampler import EpochSampler, Key, ShardSampler

COUNTS = {"length": st.integers(1, 70), "batch_size": st.integers(1, 9), "world": st.integers(1, 4)}


def epoch(number=0, **arguments):
    sampler = EpochSampler(**{"seed": 3, **arguments})
    sampler.set_epoch(number)
    return list(sampler)


@given(**COUNTS)
@settings(deadline=None)
def test_devices_see_what_one_device_with_the_whole_batch_sees(length, batch_size, world):
    if length < batch_size * world:
        return
    ranks = [epoch(length=length, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    together = [[key for rank in ranks for key in rank[step]] for step in range(len(ranks[0]))]
    assert together == epoch(length=length, batch_size=batch_size * world)
    seen = [key.item for batch in together for key in batch]
    assert len(seen) == len(set(seen)) == length // (batch_size * world) * batch_size * world


@given(**COUNTS)
@settings(deadline=None)
def test_every_device_takes_equally_many_steps_of_equal_size(length, batch_size, world):
    ranks = [epoch(length=length, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    shapes = {tuple(len(batch) for batch in rank) for rank in ranks}
    assert len(shapes) == 1
    assert min(next(iter(shapes))) >= 1
    sampler = EpochSampler(length, batch_size, 3, world=world)
    assert len(sampler) == len(ranks[0])
    if length < batch_size * world:  # nothing is left out of the only step
        assert {key.item for rank in ranks for batch in rank for key in batch} == set(range(length))


def test_epochs_and_seeds_draw_other_orders_and_every_case_comes_round():
    arguments = {"length": 10, "batch_size": 4}
    assert epoch(1, **arguments) == epoch(1, **arguments)
    assert [k.item for k in epoch(0, **arguments)[0]] != [k.item for k in epoch(1, **arguments)[0]]
    assert [k.item for k in epoch(0, **arguments)[0]] != [k.item for k in epoch(0, **arguments, seed=4)[0]]
    seen = {key.item for number in range(20) for batch in epoch(number, **arguments) for key in batch}
    assert seen == set(range(10))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_repeated_augmentation_is_laid_out_as_timms(world):
    """timm's sampler draws another order, so cases are compared by when they first appear."""
    timms = pytest.importorskip("timm.data.distributed_sampler").RepeatAugSampler
    length, batch_size = 72, 4
    mine = [
        [
            key
            for batch in epoch(1, length=length, batch_size=batch_size, rank=rank, world=world, repeats=3)
            for key in batch
        ]
        for rank in range(world)
    ]
    theirs = [
        list(timms(range(length), num_replicas=world, rank=rank, num_repeats=3, selected_round=0))
        for rank in range(world)
    ]

    def first_seen(lists):
        flat = [item for together in zip(*lists, strict=True) for item in together]
        numbers = {}
        return [numbers.setdefault(item, len(numbers)) for item in flat]

    assert first_seen([[key.item for key in rank] for rank in mine]) == first_seen(theirs)
    everything = [key for rank in mine for key in rank]
    assert len(everything) == len(set(everything)) == length  # every copy of a case is another sample
    assert {key.copy for key in everything} == {0, 1, 2}


def test_each_batch_comes_once_per_scale():
    plain = epoch(2, length=9, batch_size=4)
    scaled = epoch(2, length=9, batch_size=4, scales=(0.75, 1.0, 1.25))
    assert len(scaled) == 3 * len(plain) == len(EpochSampler(9, 4, 3, (0.75, 1.0, 1.25)))
    for number, batch in enumerate(scaled):
        scale = (0.75, 1.0, 1.25)[number % 3]
        assert batch == [Key(key.item, 2, scale) for key in plain[number // 3]]


@given(**COUNTS)
@settings(deadline=None)
def test_shards_hold_each_case_once_in_equally_many_batches(length, batch_size, world):
    if length < world:
        return
    shards = [list(ShardSampler(length, batch_size, rank, world)) for rank in range(world)]
    assert sorted(item for shard in shards for batch in shard for item in batch) == list(range(length))
    assert {len(shard) for shard in shards} == {len(ShardSampler(length, batch_size, 0, world))}
    assert all(1 <= len(batch) <= max(batch_size, 2 if world > 1 else 1) for shard in shards for batch in shard)
