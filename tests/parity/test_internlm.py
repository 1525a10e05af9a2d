"""InternLM, InternLM2 and InternLM3 against a reference in NumPy: logits, loss, greedy answers, in each published form.

Tolerance: float32 with sums of at most 48 terms of size around 1, in another order: 1e-5 relative to logits of size
around 5, hence 5e-5 absolute where logits are larger; `close` states it relative to the largest logit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import xtuner.model.loading
from tests.model.published import CONFIGS, TRAINED, VOCAB, numpy_weights, write_model
from tests.parity import internlm_reference as reference

SHORT, LONG = TRAINED // 2, TRAINED + 17


def load(tmp_path: Path, name: str, layout: str = 'bin', attention: str = 'sdpa') -> torch.nn.Module:
    assert xtuner.model.loading.register  # importing it makes plain transformers know the families
    folder = write_model(tmp_path, name, layout, stray='sharded' in layout)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def text(length: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    difference = np.abs(ours.detach().numpy() - theirs).max() / np.abs(theirs).max()
    assert difference < 1e-5, f'largest difference {difference:.2e} of the largest logit'


@pytest.mark.parametrize('length', [1, SHORT, TRAINED, TRAINED + 1, LONG])
@pytest.mark.parametrize('name', CONFIGS)
def test_logits(tmp_path: Path, name: str, length: int) -> None:
    ids = text(length)
    with torch.no_grad():
        ours = load(tmp_path, name)(torch.tensor([ids])).logits[0]
    close(ours, reference.logits(numpy_weights(name), CONFIGS[name], ids))


def test_the_reference_tells_the_forms_apart() -> None:
    """Otherwise the test above could not fail: factor 1 is no no-op past the trained length, and only there."""
    weights, ids = numpy_weights('v1'), text(LONG)
    plain, dynamic = (reference.logits(weights, CONFIGS[name], ids) for name in ('v1', 'v1-8k'))
    assert np.abs(plain - dynamic).max() > 0.1
    assert np.array_equal(*(reference.logits(weights, CONFIGS[n], ids[:TRAINED]) for n in ('v1', 'v1-8k')))


@pytest.mark.parametrize('layout', ['bin', 'bin-sharded', 'safetensors', 'safetensors-sharded'])
@pytest.mark.parametrize('name', ['v1', 'v2', 'v3'])
@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_every_layout_and_attention(tmp_path: Path, name: str, layout: str, attention: str) -> None:
    ids = text(SHORT)
    with torch.no_grad():
        ours = load(tmp_path, name, layout, attention)(torch.tensor([ids])).logits[0]
    close(ours, reference.logits(numpy_weights(name), CONFIGS[name], ids))


@pytest.mark.parametrize('name', CONFIGS)
def test_left_padding(tmp_path: Path, name: str) -> None:
    long, short = text(LONG), text(SHORT, seed=2)
    padded = torch.tensor([long, [2] * (LONG - SHORT) + short])
    mask = torch.tensor([[1] * LONG, [0] * (LONG - SHORT) + [1] * SHORT])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = load(tmp_path, name)(padded, attention_mask=mask, position_ids=positions).logits
    weights, config = numpy_weights(name), CONFIGS[name]
    close(ours[0], reference.logits(weights, config, long))
    close(ours[1, -SHORT:], reference.logits(weights, config, short, base_length=LONG))


@pytest.mark.parametrize('name', CONFIGS)
def test_loss(tmp_path: Path, name: str) -> None:
    ids = text(LONG)
    with torch.no_grad():
        ours = load(tmp_path, name)(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert float(ours) == pytest.approx(reference.loss(numpy_weights(name), CONFIGS[name], ids), rel=1e-5)


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('cache', ['dynamic', 'static', None])
def test_greedy_answers_past_the_trained_length(tmp_path: Path, name: str, cache: str | None) -> None:
    ids, num_new = text(SHORT), LONG - SHORT
    options = {'use_cache': cache is not None} | ({'cache_implementation': cache} if cache else {})
    model = load(tmp_path, name)
    model.generation_config.eos_token_id = None
    ours = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, SHORT, dtype=torch.int64),
                          do_sample=False, max_new_tokens=num_new, pad_token_id=2, **options)  # fmt: skip
    theirs = reference.greedy(numpy_weights(name), CONFIGS[name], ids, num_new, cached=cache is not None)
    assert ours[0].tolist() == theirs


@pytest.mark.parametrize('name', ['v1', 'v1-8k', 'v1-8k-factor', 'v2', 'v2-dynamic', 'v2-linear', 'v3'])
def test_a_text_read_in_pieces(tmp_path: Path, name: str) -> None:
    """Past the trained length, beside a row that is padded at the left."""
    model = load(tmp_path, name)
    long, short = text(LONG), text(SHORT, seed=2)
    ids = torch.tensor([long, [2] * (LONG - SHORT) + short])
    mask = torch.tensor([[1] * LONG, [0] * (LONG - SHORT) + [1] * SHORT])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    weights, config = numpy_weights(name), CONFIGS[name]
    cache, theirs = None, []
    for begin, end in ((0, TRAINED - 5), (TRAINED - 5, LONG - 1), (LONG - 1, LONG)):
        with torch.no_grad():
            output = model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=positions[:, begin:end],
                           past_key_values=cache, use_cache=True)  # fmt: skip
        cache = output.past_key_values
        close(output.logits[0], reference.logits(weights, config, long[begin:end], cache=theirs))
    theirs = []
    reference.logits(weights, config, short[:-1], base_length=LONG - 1, cache=theirs)
    close(output.logits[1], reference.logits(weights, config, short[-1:], base_length=LONG, cache=theirs))


def test_a_cache_matters_to_the_reference() -> None:
    """A cache past the trained length gives other logits than none, or the tests above would prove nothing."""
    weights, config, ids = numpy_weights('v1-8k'), CONFIGS['v1-8k'], text(LONG)
    cache: list = []
    reference.logits(weights, config, ids[:-1], cache=cache)
    in_steps = reference.logits(weights, config, ids[-1:], cache=cache)[-1]
    assert np.abs(in_steps - reference.logits(weights, config, ids)[-1]).max() > 1e-3


@pytest.mark.parametrize('name', ['v1-8k', 'v2-dynamic', 'v3'])
def test_a_long_call_does_not_change_the_next(tmp_path: Path, name: str) -> None:
    model = load(tmp_path, name)
    with torch.no_grad():
        for length in (SHORT, TRAINED + 5):
            before = model(torch.tensor([text(length)])).logits
            model(torch.tensor([text(LONG)]))
            assert torch.equal(model(torch.tensor([text(length)])).logits, before)


@pytest.mark.parametrize('name', CONFIGS)
def test_save_and_load_again(tmp_path: Path, name: str) -> None:
    model = load(tmp_path / 'published', name)
    model.save_pretrained(tmp_path / 'saved')
    again = AutoModelForCausalLM.from_pretrained(tmp_path / 'saved', dtype=torch.float32)
    assert type(again) is type(model)
    ids = torch.tensor([text(LONG)])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize('name', ['v1', 'v1-8k', 'v2', 'v3'])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, name: str) -> None:
    ids = torch.tensor([text(LONG)])
    gradients = []
    for checkpointing in (False, True):
        model = load(tmp_path / str(checkpointing), name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({'use_reentrant': False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({key: value.grad for key, value in model.named_parameters()})
    assert all(torch.equal(gradients[0][key], gradients[1][key]) for key in gradients[0])
