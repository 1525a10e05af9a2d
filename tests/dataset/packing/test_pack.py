from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner.dataset.packing.pack import PACKINGS, pack_samples
from xtuner.errors import DataError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize('packing', PACKINGS)
@given(st.lists(st.integers(1, 50), max_size=200))
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(packing, lengths):
    packs = pack_samples(lengths, 50, packing=packing)
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))
    sizes = packs.lengths(np.asarray(lengths, dtype=np.int64))
    assert sizes.sum() == sum(lengths)
    assert all(1 <= size <= 50 for size in sizes)
    assert len(packs) == len(sizes)


@pytest.mark.parametrize(
    ('lengths', 'packing', 'expected'),
    [
        ([], 'best_fit', []),
        ([10], 'best_fit', [[0]]),
        ([7, 3, 5, 2, 8, 4], 'best_fit', [[3, 4], [0, 1], [2, 5]]),
        ([7, 3, 5, 2, 8, 4], 'first_fit', [[0, 1], [2, 3], [4], [5]]),
        ([7, 3, 5, 2, 8, 4], 'stream', [[0, 1], [2, 3], [4], [5]]),
        ([6, 6, 4], 'first_fit', [[0, 2], [1]]),
        ([6, 6, 4], 'stream', [[0], [1, 2]]),
        ([1, 2], 'none', [[0], [1]]),
    ],
)
def test_worked_examples(lengths, packing, expected):
    packs = pack_samples(lengths, 10, packing=packing)
    assert [sorted(packs[i].tolist()) for i in range(len(packs))] == expected


def test_best_fit_fills_more_than_first_fit_and_that_more_than_stream():
    lengths = np.random.default_rng(1).integers(20, 900, 4000)
    counts = [len(pack_samples(lengths, 2048, packing=packing)) for packing in ('best_fit', 'first_fit', 'stream')]
    assert counts == sorted(counts) and counts[0] < counts[2]
    assert lengths.sum() / (counts[0] * 2048) > 0.99


def test_first_fit_closes_the_fullest_when_too_many_are_open():
    packs = pack_samples([9] * 1000 + [1] * 1000, 10, packing='first_fit')
    assert len(packs) <= 1000 + 744 / 10 + 1
    assert sorted(packs.samples.tolist()) == list(range(2000))


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('wrong', [0, 11])
def test_a_length_that_cannot_be_is_refused(packing, wrong):
    with pytest.raises(DataError, match=f'sample 1 has {wrong} tokens; a pack holds 1 to 10'):
        pack_samples([3, wrong], 10, packing=packing)


def test_an_unknown_packing_is_named():
    with pytest.raises(DataError, match=r"'best_fitt'; did you mean 'best_fit'"):
        pack_samples([1], 10, packing='best_fitt')


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('max_length', [2**31, 10**12, 10**30])
def test_an_absurd_length_of_packs_costs_nothing(packing, max_length):
    lengths = np.random.default_rng(0).integers(1, 5000, 2000)
    packs = pack_samples(lengths, max_length, packing=packing)
    assert len(packs) == (2000 if packing == 'none' else 1)


@pytest.mark.timeout(120)  # seconds; with a bit for each token of room, as it once was, a quarter of an hour
def test_a_million_samples_in_packs_of_a_million_tokens():
    lengths = np.random.default_rng(0).integers(1, 200_000, 1_000_000)
    packs = pack_samples(lengths, 2**20)
    assert lengths.sum() / (len(packs) * 2**20) > 0.99
