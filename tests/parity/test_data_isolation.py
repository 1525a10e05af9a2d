"""Samples of a pack do not see each other: logits, losses and gradients are those of the samples alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.dataset.packing.collate import collate
from xtuner.dataset.packing.pack import pack_samples

TOLERANCE = 2e-5  # float32, two layers: other shapes sum in another order
LENGTHS = [7, 1, 12, 5, 9, 3, 2, 16]


def make_model(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, attn_implementation=attention)  # fmt: skip
    return LlamaForCausalLM(config)


def make_samples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in LENGTHS:
        ids = torch.randint(1, 64, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 2)] = -100
        samples.append({'input_ids': ids, 'labels': labels, 'position_ids': torch.arange(length)})
    return samples


def join(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def loss_sum(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten(), ignore_index=-100, reduction='sum'
    )


def gradient(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """The summed loss over batches, and its gradient over all parameters."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_sum(model, batch)
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.fixture(params=['sdpa', 'eager'])
def model(request) -> LlamaForCausalLM:
    return make_model(request.param)


@pytest.mark.parametrize('multiple_of', [1, 8, 64])
@pytest.mark.parametrize('max_length', [16, 20, 64])
def test_logits_of_each_sample_are_those_of_the_sample_alone(model, max_length, multiple_of):
    samples = make_samples()
    packs = pack_samples(LENGTHS, max_length)
    batch = collate(
        [join([samples[i] for i in packs[p]]) for p in range(len(packs))], pad_id=0, multiple_of=multiple_of
    )
    packed = model(input_ids=batch['input_ids'], position_ids=batch['position_ids'], use_cache=False).logits
    for p in range(len(packs)):
        ends = torch.tensor([0, *(LENGTHS[i] for i in packs[p])]).cumsum(0).tolist()
        for i, (start, end) in zip(packs[p], pairwise(ends), strict=True):
            alone = model(input_ids=samples[i]['input_ids'][None], use_cache=False).logits[0]
            torch.testing.assert_close(packed[p, start:end], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize('checkpointing', [False, True])
def test_loss_and_gradient_do_not_depend_on_packing_batch_or_padding(model, checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    samples = make_samples()
    expected, grad = gradient(model, [collate([sample], pad_id=0) for sample in samples])
    packs = pack_samples(LENGTHS, 24)
    rows = [join([samples[i] for i in packs[p]]) for p in range(len(packs))]
    arrangements = {
        'one batch of single samples': [collate(samples, pad_id=0)],
        'four batches of two': [collate(samples[i : i + 2], pad_id=5, multiple_of=4) for i in range(0, 8, 2)],
        'a pack at a time': [collate([row], pad_id=0) for row in rows],
        'all packs at once': [collate(rows, pad_id=0, multiple_of=16)],
        'everything in one row': [collate([join(samples)], pad_id=0)],
    }
    for name, batches in arrangements.items():
        loss, got = gradient(model, batches)
        assert loss == pytest.approx(expected, rel=1e-5), name
        assert (got - grad).norm() / grad.norm() < 1e-5, name


def test_changing_one_sample_changes_no_other(model):
    samples = make_samples()
    row = join([samples[0], samples[2], samples[3]])
    changed = join([samples[0], {**samples[2], 'input_ids': (samples[2]['input_ids'] + 7) % 64}, samples[3]])
    logits = [model(**{k: v[None] for k, v in r.items() if k != 'labels'}, use_cache=False).logits[0]
              for r in (row, changed)]  # fmt: skip
    first, last = LENGTHS[0], LENGTHS[0] + LENGTHS[2]
    assert torch.equal(logits[0][:first], logits[1][:first])
    torch.testing.assert_close(logits[0][last:], logits[1][last:], rtol=0, atol=TOLERANCE)
    assert (logits[0][first:last] - logits[1][first:last]).abs().max() > 1e-3  # the change is one


def test_without_restarting_positions_samples_would_see_each_other(model):
    """The check above can fail: positions that run on make one sample of the row."""
    samples = make_samples()
    row = join([samples[0], samples[2]])
    run_on = torch.arange(len(row['input_ids']))[None]
    seen = model(input_ids=row['input_ids'][None], position_ids=run_on, use_cache=False).logits[0, LENGTHS[0] :]
    alone = model(input_ids=samples[2]['input_ids'][None], use_cache=False).logits[0]
    assert (seen - alone).abs().max() > 1e-2
