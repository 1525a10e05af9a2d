"""Sampling: frequencies under temperature and top-p, compared with transformers' logits processors."""

from __future__ import annotations

from random import Random

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from xtuner.inference.generate import Sampling
from xtuner.inference.sampling import sample_tokens

LOGITS = torch.tensor([1.0, 3.0, 2.5, -1.0, 0.0, 2.0])


@pytest.mark.parametrize(('temperature', 'top_p'), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.9), (1.0, 0.0)])
def test_shares_are_those_of_transformers(temperature: float, top_p: float) -> None:
    num = 20_000
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    want = warpers(torch.zeros(1, 1, dtype=torch.long), LOGITS[None].clone()).softmax(-1)[0]
    random = Random(0)
    drawn = sample_tokens(LOGITS.expand(num, -1), [Sampling(1, temperature, top_p)] * num, [random] * num)
    got = torch.bincount(torch.tensor(drawn), minlength=len(LOGITS)) / num
    assert set(drawn) == set(want.nonzero()[:, 0].tolist()), 'another set of words'
    deviation = (want * (1 - want) / num).sqrt()
    assert ((got - want).abs() <= 4.5 * deviation + 1e-9).all()


def test_each_in_its_own_way_and_no_number_taken_by_the_greedy() -> None:
    logits = torch.stack([LOGITS, LOGITS, LOGITS.flip(0)])
    samplings = [Sampling(1, 0.0, 1.0), Sampling(1, 1.0, 1.0), Sampling(1, 0.0, 0.1)]
    randoms = [Random(number) for number in range(3)]
    alone = sample_tokens(LOGITS[None], samplings[1:2], [Random(1)])
    assert sample_tokens(logits, samplings, randoms) == [1, alone[0], 4]
    assert [r.getstate() == Random(n).getstate() for n, r in enumerate(randoms)] == [True, False, True]


@pytest.mark.parametrize('temperature', [1e-9, 1e9])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    big = torch.tensor([[1e4, -1e4, 0.0, float('-inf')]])
    drawn = {sample_tokens(big, [Sampling(1, temperature, 1.0)], [Random(n)])[0] for n in range(50)}
    assert drawn == ({0} if temperature < 1 else {0, 1, 2})


@pytest.mark.parametrize('top_p', [0.3, 0.97, 1.0])
def test_a_large_vocabulary_is_drawn_from_alike(top_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of candidates that are tried first: enough of them, too few, all."""
    logits = 2 * torch.randn(40, 1000, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(1, 0.9, top_p)] * 40
    drawn = []
    for few in (1, 30, 256, 500):
        monkeypatch.setattr('xtuner.inference.sampling._NUM_CANDIDATES', few)
        drawn.append(sample_tokens(logits, samplings, [Random(n) for n in range(40)]))
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
    assert len(set(drawn[0])) > 20
