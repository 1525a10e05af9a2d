from __future__ import annotations

import numpy as np
import pytest

from xtuner.dataset.packing.sampler import EpochSampler, LengthGroupedEpochSampler


def make(kind, num_items, **options):
    if kind == 'grouped':
        lengths = np.random.default_rng(3).integers(1, 100, num_items)
        return LengthGroupedEpochSampler(lengths, batch_size=4, batches_in_group=5, **options)
    return EpochSampler(num_items, **options)


@pytest.mark.parametrize('kind', ['plain', 'grouped'])
@pytest.mark.parametrize('num_items', [1, 7, 64, 101])
def test_an_epoch_is_every_item_once_and_a_function_of_seed_and_epoch(kind, num_items):
    orders = set()
    for seed in (0, 1):
        sampler = make(kind, num_items, seed=seed)
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            order = list(sampler)
            assert sorted(order) == list(range(num_items)) and len(sampler) == num_items
            assert order == list(sampler)
            orders.add(tuple(order))
    assert len(orders) == (4 if num_items > 7 else len(orders))


@pytest.mark.parametrize('kind', ['plain', 'grouped'])
def test_skipping_goes_on_where_a_run_stopped(kind):
    sampler = make(kind, 50, seed=5, rank=1, world_size=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    for skip in (0, 1, 16, 17):
        sampler.set_epoch(2, skip=skip)
        assert list(sampler) == whole[skip:]


@pytest.mark.parametrize('kind', ['plain', 'grouped'])
@pytest.mark.parametrize('num_items', [1, 2, 8, 9])
@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_ranks_see_together_what_one_sees(kind, num_items, world_size):
    ranks = [list(make(kind, num_items, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    together = [index for step in zip(*ranks, strict=True) for index in step]
    assert set(together) == set(range(num_items))
    assert len(together) - num_items < world_size
    if kind == 'plain':
        assert together[:num_items] == list(make(kind, num_items, seed=1))


def test_unshuffled_order_is_the_data_s():
    assert list(EpochSampler(5, seed=0, shuffle=False, rank=1, world_size=2)) == [1, 3, 0]


def test_batches_of_the_grouped_order_are_of_similar_length_and_begin_with_the_longest():
    lengths = np.random.default_rng(0).integers(1, 1000, 800)
    sampler = LengthGroupedEpochSampler(lengths, batch_size=8, seed=0)
    batches = np.array(list(sampler)).reshape(-1, 8)
    padded = lengths[batches].max(axis=1).sum() * 8 / lengths.sum()
    plain = np.array(list(EpochSampler(800, seed=0))).reshape(-1, 8)
    assert padded < 1.05 < 1.5 < lengths[plain].max(axis=1).sum() * 8 / lengths.sum()
    assert lengths[batches[0]].max() == lengths.max()


def test_the_longest_item_comes_first_and_only_in_the_first_epoch():
    lengths = [5, 9, 3, 9, 7, 1]
    num_moved = 0
    for seed in range(20):
        plain, sampler = EpochSampler(6, seed=seed), EpochSampler(6, seed=seed, lengths=lengths)
        before, after = plain.order().tolist(), sampler.order().tolist()
        place = min(before.index(1), before.index(3))  # of the longest that comes first without lengths
        before[0], before[place] = before[place], before[0]
        assert after == before and lengths[after[0]] == 9
        num_moved += place > 0
        for each in (plain, sampler):
            each.set_epoch(1)
        assert list(sampler) == list(plain)
    assert num_moved > 5


def grouped_one_by_one(lengths, order, *, seed, epoch, batch, group):
    """The grouped order as runs began with it were given it, written out batch by batch: O(n^2) at worst."""
    groups = [order[start : start + group] for start in range(0, len(order), group)]
    ordered = [sorted(items, key=lambda item: -lengths[item]) for items in groups]
    batches = [items[i : i + batch] for items in ordered for i in range(0, len(items), batch)]
    last = [batches.pop()] if batches and len(batches[-1]) < batch else []
    places = np.random.default_rng([seed, epoch, 1]).permutation(len(batches)).tolist()
    longest = max(range(len(batches)), key=lambda place: max(lengths[i] for i in batches[place]), default=None)
    places.sort(key=lambda place: place != longest)
    return [item for items in [*(batches[place] for place in places), *last] for item in items]


@pytest.mark.parametrize('most', [2, 5000])  # few lengths: many are the longest
@pytest.mark.parametrize('num_items', [1, 7, 8, 64, 163, 640])
def test_the_grouped_order_is_the_one_that_runs_began_with(num_items, most):
    lengths = np.random.default_rng(num_items).integers(1, most, num_items)
    for seed, epoch, batch_size, batches_in_group in ((0, 0, 8, 4), (5, 1, 4, 5), (7, 2, 1, 50)):
        sampler = LengthGroupedEpochSampler(
            lengths, batch_size=batch_size, seed=seed, batches_in_group=batches_in_group
        )
        sampler.set_epoch(epoch)
        plain = np.random.default_rng([seed, epoch]).permutation(num_items).tolist()
        expected = grouped_one_by_one(lengths.tolist(), plain, seed=seed, epoch=epoch, batch=batch_size,
                                      group=batch_size * batches_in_group)  # fmt: skip
        assert sampler.order().tolist() == expected


@pytest.mark.timeout(60)  # half a second; what is quadratic takes hours
def test_a_million_lengths_are_ordered_in_a_moment():
    lengths = np.random.default_rng(0).integers(1, 4096, 1_000_000)
    order = LengthGroupedEpochSampler(lengths, batch_size=16, seed=0).order()
    assert np.array_equal(np.sort(order), np.arange(1_000_000))
    assert lengths[order[:16]].max() == lengths.max()
