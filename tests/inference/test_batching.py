"""Slots of different lengths in one pass, for each family: logits equal those of each text alone without a cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.gemma3 import Gemma3ForCausalLM, Gemma3TextConfig

from xtuner.errors import ModelError
from xtuner.inference.batch_graphs import StepGraphs, relative_error
from xtuner.inference.batching import BatchDecoder
from xtuner.model.families.internlm.configuration import InternLMConfig
from xtuner.model.families.internlm.modeling import InternLMForCausalLM
from xtuner.model.families.internlm2.configuration import InternLM2Config
from xtuner.model.families.internlm2.modeling import InternLM2ForCausalLM

SIZE: dict[str, Any] = {
    'vocab_size': 97, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'max_position_embeddings': 128, 'initializer_range': 0.2,
}  # fmt: skip
MODELS: dict[str, Any] = {
    'internlm': lambda: InternLMForCausalLM(InternLMConfig(**SIZE | {'num_key_value_heads': 4})),
    'internlm, dynamic NTK': lambda: InternLMForCausalLM(
        InternLMConfig(**SIZE | {'num_key_value_heads': 4, 'rotary': {'base': 10000, 'type': 'dynamic'}})
    ),
    'internlm2': lambda: InternLM2ForCausalLM(InternLM2Config(**SIZE)),
    'llama': lambda: LlamaForCausalLM(LlamaConfig(**SIZE)),
    'qwen2': lambda: Qwen2ForCausalLM(Qwen2Config(**SIZE)),
    'mistral, a window of 6': lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=6)),
    'gemma3, a window of 6 in some layers': lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=6, layer_types=['sliding_attention', 'full_attention'])
    ),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


def test_each_slot_gives_the_logits_of_its_text_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (44, 9, 20, 30)]
    starts = [30, 1, 13, 5]  # how much of each is its prompt
    decoder = BatchDecoder(model, num_slots=5, max_length=64)
    decoder.prefill([texts[0][:16]], slot=1)  # a long one in two pieces, three short ones together
    got: list[list[Any]] = [[decoder.prefill([texts[0][16:30]], slot=1, start=16)[0]], [], [], []]
    together = decoder.prefill([text[:n] for text, n in zip(texts[1:], starts[1:], strict=True)], slot=2)
    for number in (1, 2, 3):
        got[number].append(together[number - 1])
    order, first, lengths = [0, 1, 2, 3], 1, list(starts)
    while order:
        ids = [texts[number][lengths[number]] for number in order]
        for number, logits in zip(order, decoder.step(ids, [lengths[n] for n in order], slot=first), strict=True):
            got[number].append(logits)
            lengths[number] += 1
        for number in [n for n in order if lengths[n] == len(texts[n])]:  # one that ends leaves, the last takes its row
            at = order.index(number)
            last = order.pop()
            if last != number:
                decoder.move(first + len(order), first + at, lengths[last])
                order[at] = last
        if order == [0, 2]:  # one more in front
            decoder.move(1 + 1, 0, lengths[2])
            order, first = [2, 0], 0
    with torch.inference_mode():
        for text, start, logits in zip(texts, starts, got, strict=True):
            want = copy.deepcopy(model).double()(torch.tensor([text]), use_cache=False).logits[0, start - 1 :]
            assert torch.stack(logits).shape == want.shape
            # float32 against float64: a wrong place or a wrong row is of order 1.
            torch.testing.assert_close(torch.stack(logits).double(), want, atol=2e-4, rtol=1e-3)


def test_the_cache_has_a_constant_size(model: Any) -> None:
    decoder = BatchDecoder(model, num_slots=3, max_length=64)
    config = model.config
    head = getattr(config, 'head_dim', None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * 3 * config.num_key_value_heads * 64 * head * 4
    assert decoder.cache_bytes == size
    decoder.prefill([[5] * 64] * 3, slot=0)
    assert decoder.cache_bytes == size


def test_a_recurrent_model_is_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZE))
    model.config.layer_types = ['linear_attention', 'full_attention']
    with pytest.raises(ModelError, match='linear_attention'):
        BatchDecoder(model, num_slots=1, max_length=8)


class Replayed(StepGraphs):
    """Replays by running the pass again, which tests the choice of slots, positions and inputs of a graph."""

    spoilt = False

    def _capture(self, ids: Any, positions: Any, places: int) -> Any:
        expected = self._forward(ids, positions, places).clone()
        logits = expected.clone()

        def replay() -> None:
            logits.copy_(self._forward(ids, positions, places) + self.spoilt)

        return SimpleNamespace(replay=replay), logits, expected


def steps_beside(recorded: BatchDecoder, plain: BatchDecoder) -> None:
    """Slots are added, lengths move from one graph to the next, two keys; compared with steps without graphs."""
    for num_slots in (1, 3, 5):
        lengths = [248 + slot for slot in range(num_slots)]
        for decoder in (recorded, plain):
            decoder.prefill([[5 + slot] * length for slot, length in enumerate(lengths)], slot=0)
        for number in range(10):
            ids = [(7 * number + slot) % 90 + 3 for slot in range(num_slots)]
            got = recorded.step(ids, lengths, slot=0, exclusive=True, key=number % 2).clone()
            torch.testing.assert_close(got, plain.step(ids, lengths, slot=0), atol=1e-3, rtol=1e-3)
            lengths = [length + 1 for length in lengths]


def two_decoders(device: str) -> tuple[BatchDecoder, BatchDecoder]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZE | {'max_position_embeddings': 1024})).to(device).eval()
    recorded, plain = (BatchDecoder(model, num_slots=6, max_length=600) for _ in range(2))
    plain._graphs = None
    return recorded, plain


@torch.inference_mode()
def test_a_recording_is_of_the_next_power_of_two() -> None:
    recorded, plain = two_decoders('cpu')
    graphs = recorded._graphs = Replayed(recorded._decode_step, num_slots=6, max_length=600, device=torch.device('cpu'))
    steps_beside(recorded, plain)
    assert not graphs.reason_disabled
    assert {(num_slots, places) for _, num_slots, places in graphs._recorded} == {
        (r, p) for r in (1, 4, 6) for p in (256, 512)
    }
    assert {key for key, _, _ in graphs._recorded} == {0, 1}
    num_recorded = len(graphs._recorded)
    recorded.step([5, 6], [20, 30], slot=1, exclusive=True)
    recorded.step([5, 6], [20, 30], slot=0, exclusive=False)
    assert len(graphs._recorded) == num_recorded, 'a graph writes to slots that others may use'


@torch.inference_mode()
def test_a_recording_that_says_something_else_is_not_used() -> None:
    recorded, plain = two_decoders('cpu')
    graphs = recorded._graphs = Replayed(recorded._decode_step, num_slots=6, max_length=600, device=torch.device('cpu'))
    graphs.spoilt = True
    steps_beside(recorded, plain)
    assert 'logits of a recorded step differ' in graphs.reason_disabled and not graphs._recorded


def test_the_relative_error_of_logits() -> None:
    """Of the row with the largest error; NaN gives infinity."""
    expected = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
    assert relative_error(expected + torch.tensor([[0.3, 0.4], [0.0, 0.5]]), expected) == pytest.approx(0.1)
    assert relative_error(expected.flip(0), expected) > 1
    assert relative_error(expected * torch.tensor([[1.0], [float('nan')]]), expected) == float('inf')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('quantised', [False, True], ids=['floats', '4 bit'])
@torch.inference_mode()
def test_wide_models_in_half_precision_are_recorded(quantised: bool) -> None:
    """At a 7B model's width, whose rounding is visible in the logits; 1 and 16 slots, also with 4-bit layers."""
    from benchmarks.qlora_model import build_base

    model = build_base('cuda', quantise=quantised, num_hidden_layers=4, vocab_size=32000).eval()
    recorded, plain = (BatchDecoder(model, num_slots=16, max_length=512) for _ in range(2))
    plain._graphs = None
    for num_slots in (1, 16):
        lengths = list(range(20, 20 + num_slots))
        for decoder in (recorded, plain):
            decoder.prefill([[7 * n % 2000 + 5 for n in range(length)] for length in lengths], slot=0)
        for number in range(3):
            ids = [11 * slot + number for slot in range(num_slots)]
            got = recorded.step(ids, lengths, slot=0, exclusive=True).clone()
            assert relative_error(got, plain.step(ids, lengths, slot=0)) < 0.05
            lengths = [length + 1 for length in lengths]
    assert recorded._graphs is not None and not recorded._graphs.reason_disabled
    assert {num_slots for _, num_slots, _ in recorded._graphs._recorded} == {1, 16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@torch.inference_mode()
def test_recorded_steps_are_the_steps() -> None:
    recorded, plain = two_decoders('cuda')
    steps_beside(recorded, plain)
    assert recorded._graphs is not None and not recorded._graphs.reason_disabled
