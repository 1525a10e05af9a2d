from __future__ import annotations

import numpy as np
import pytest

from xtuner.dataset.sampler import EpochSampler, LengthGroupedEpochSampler


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
    plain, sampler = EpochSampler(6, seed=4), EpochSampler(6, seed=4, lengths=lengths)
    first, longest = sampler.order(), plain.order()
    assert lengths[first[0]] == 9
    assert sorted(first) == list(range(6))
    moved = [place for place in range(6) if first[place] != longest[place]]
    assert len(moved) in (0, 2)  # two have changed places, or it was there
    for each in (plain, sampler):
        each.set_epoch(1)
    assert list(sampler) == list(plain)
