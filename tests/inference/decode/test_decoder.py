"""Decoding compared with transformers' `generate`: same ids, greedy and sampled, for every supported architecture."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.decode.compare import DRAWN, GREEDY, PROMPT, STOP, assert_decoded, four_bit, plainly
from tests.model.published import CONFIGS, TRAINED, write_model
from tests.tiny_models import dequantised, tiny_llama, with_adapter
from xtuner.inference.decode import decoder as decoding
from xtuner.inference.generate import Sampling, generate, warm_up
from xtuner.model.loading import load_model

if torch.cuda.is_available():
    pytest.skip('these are for a CPU; test_recorded.py is for a GPU', allow_module_level=True)


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_internlm_in_every_form(tmp_path: Path, name: str) -> None:
    assert_decoded(load_model(write_model(tmp_path, name), dtype=torch.float32))


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
@pytest.mark.parametrize('bias', [True, False])
def test_llama(kv_heads: int, bias: bool) -> None:
    assert_decoded(tiny_llama(kv_heads=kv_heads, bias=bias).eval())


def test_four_bit_with_and_without_adapter() -> None:
    model = four_bit()
    base = assert_decoded(model)
    adapted = with_adapter(model, dropout=0.3).eval()
    with_it = assert_decoded(adapted)
    assert with_it != base
    with adapted.disable_adapter():
        assert assert_decoded(adapted) == base


def test_several_forms_of_adapter() -> None:
    adapted = with_adapter(tiny_llama(), targets=['q_proj', 'down_proj'], use_rslora=True).eval()
    before = assert_decoded(adapted)
    adapted.merge_adapter()
    assert assert_decoded(adapted) == before
    adapted.unmerge_adapter()
    assert assert_decoded(adapted) == before


def test_logits_against_float64() -> None:
    model = with_adapter(four_bit()).eval()
    exact = dequantised(model)(input_ids=torch.tensor([PROMPT])).logits[0, -1].detach()
    decoder = decoding.find_decoder(model, 20)
    with torch.inference_mode():
        decoder._prepare(20)
        whole = decoder._prefill(PROMPT)
        decoder._ids = []
        decoder._prefill(PROMPT[:2])
        for token in PROMPT[2:]:
            stepped = decoder._run([token])
    for logits in (whole, stepped):  # float32 through two layers
        assert float((logits[0].double() - exact).norm() / exact.norm()) < 5e-6


def test_weights_too_large_to_be_kept_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, 'free_bytes', lambda device: 0)
    assert_decoded(with_adapter(four_bit()).eval())
    assert_decoded(with_adapter(tiny_llama(bias=False)).eval())


def test_a_prompt_that_begins_as_the_last_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().eval()
    answer = assert_decoded(model)
    longer = [*PROMPT, *answer, 8, 9]
    lengths = []
    own = decoding.forward_layers
    monkeypatch.setattr(
        decoding, 'forward_layers', lambda layers, x, *rest: lengths.append(len(x)) or own(layers, x, *rest)
    )
    assert generate(model, longer, stop_ids=STOP, sampling=GREEDY) == plainly(model, longer, GREEDY)
    assert lengths[0] <= 4
    lengths.clear()
    assert generate(model, longer, stop_ids=STOP, sampling=GREEDY) == plainly(model, longer, GREEDY)
    assert lengths[0] == 1
    shorter = [*PROMPT[:3], 50]
    assert generate(model, shorter, stop_ids=STOP, sampling=GREEDY) == plainly(model, shorter, GREEDY)


def test_a_prompt_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, 'PREFILL_CHUNK', 4)
    assert_decoded(tiny_llama().eval())


@pytest.mark.parametrize('quietly', [False, True])
def test_changed_weights_are_seen(quietly: bool) -> None:
    """Some optimizers change memory without incrementing PyTorch's version counter."""
    model = with_adapter(four_bit()).eval()
    before = assert_decoded(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'lora_B' in name:
                if quietly:
                    parameter.detach().numpy()[...] *= -3
                else:
                    parameter.mul_(-3)
    assert assert_decoded(model) != before


def test_replaced_and_wrapped_layers_are_seen() -> None:
    model = tiny_llama().eval()
    before = assert_decoded(model)
    adapted = with_adapter(model).eval()
    assert assert_decoded(adapted) != before
    with torch.no_grad():
        model.lm_head = torch.nn.Linear(64, 97, bias=False)
    assert_decoded(adapted)


def test_stops_and_lengths() -> None:
    model = tiny_llama().eval()
    answer = plainly(model, PROMPT, DRAWN)
    stop = answer[4]
    got = generate(model, PROMPT, stop_ids=[2, stop], sampling=DRAWN)
    assert got == answer[: answer.index(stop) + 1]
    one = Sampling(1, 0.9, 0.7, seed=3)
    assert generate(model, PROMPT, stop_ids=STOP, sampling=one) == answer[:1]


def test_dynamic_positions_past_the_trained_length_are_transformers_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(write_model(tmp_path, 'v1-8k'), dtype=torch.float32)
    long = Sampling(max_new_tokens=TRAINED, temperature=0)
    with caplog.at_level('INFO', logger='xtuner'):
        got = generate(model, PROMPT, stop_ids=STOP, sampling=long)
    assert got == plainly(model, PROMPT, long)
    assert 'exceed the trained length 24' in caplog.text


def test_plain_positions_past_the_trained_length(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, 'v1'), dtype=torch.float32)
    long = Sampling(max_new_tokens=40, temperature=0)
    assert generate(model, PROMPT, stop_ids=STOP, sampling=long) == plainly(model, PROMPT, long)


def test_what_it_does_not_know_is_left_to_transformers() -> None:
    model = with_adapter(tiny_llama(), use_dora=True).eval()
    assert 'DoRA' in str(decoding.find_decoder(model, 20))
    assert generate(model, PROMPT, stop_ids=STOP, sampling=GREEDY) == plainly(model, PROMPT, GREEDY)
    plain = tiny_llama().eval()
    handle = plain.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0)
    assert 'hook' in str(decoding.find_decoder(plain, 20))
    hooked = generate(plain, PROMPT, stop_ids=STOP, sampling=DRAWN)
    handle.remove()
    assert hooked != generate(plain, PROMPT, stop_ids=STOP, sampling=DRAWN)
    assert 'training' in str(decoding.find_decoder(plain.train(), 20))


def test_nothing_is_kept_of_a_model_that_has_gone() -> None:
    model = tiny_llama().eval()
    generate(model, PROMPT, stop_ids=STOP, sampling=GREEDY)
    cache = weakref.ref(decoding.find_decoder(model, 20)._cache)
    gc.disable()
    try:
        del model
        assert cache() is None
    finally:
        gc.enable()


def test_a_copy_of_a_model_has_its_own_decoder() -> None:
    model = tiny_llama().eval()
    before = assert_decoded(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.mul_(-2)
    assert assert_decoded(twin) != before
    assert assert_decoded(model) == before


def test_base_and_adapter_in_turn_keep_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = with_adapter(four_bit()).eval()
    with_it = assert_decoded(adapted)
    with adapted.disable_adapter():
        without = assert_decoded(adapted)
    lengths = []
    own = decoding.forward_layers
    monkeypatch.setattr(
        decoding, 'forward_layers', lambda layers, x, *rest: lengths.append(len(x)) or own(layers, x, *rest)
    )
    assert assert_decoded(adapted) == with_it != without
    with adapted.disable_adapter():
        assert assert_decoded(adapted) == without
    assert set(lengths) == {1}  # no prompt was computed again


def test_too_little_memory_for_the_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decoding, 'KVCache', fail)
    model = tiny_llama().eval()
    with caplog.at_level('INFO', logger='xtuner'):
        assert generate(model, PROMPT, stop_ids=STOP, sampling=DRAWN) == plainly(model, PROMPT, DRAWN)
    assert 'not enough memory' in caplog.text


def test_an_answer_that_was_interrupted_spoils_nothing() -> None:
    class Stop(BaseException):
        pass

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                raise Stop

        def end(self) -> None:
            raise AssertionError

    model = tiny_llama().eval()
    with pytest.raises(Stop):
        generate(model, PROMPT, stop_ids=STOP, sampling=DRAWN, streamer=Streamer())  # type: ignore[arg-type]
    assert_decoded(model)


def test_warming_draws_no_random_numbers() -> None:
    model = tiny_llama().eval()
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    warm_up(model, 64)
    assert torch.equal(torch.rand(2), expected)
    assert decoding.find_decoder(model, 20)._cache is not None
