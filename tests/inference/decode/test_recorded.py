"""The recorded decode step on a GPU: same ids as transformers, whatever ran before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.inference.decode.compare import DRAWN, GREEDY, PROMPT, STOP, assert_decoded, four_bit
from tests.model.published import CONFIGS, write_model
from tests.tiny_models import dequantised, quantise, tiny_llama, with_adapter
from xtuner.inference.decode import decoder as decoding
from xtuner.inference.generate import Sampling, generate
from xtuner.model.loading import load_model

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip('needs a CUDA device', allow_module_level=True)


def recorded(model: Any) -> Any:
    decoder: Any = decoding.find_decoder(model, 20)
    assert decoder._step is not None and decoder._step._graph is not None, decoder._step_disabled_reason
    return decoder


@pytest.mark.parametrize('kv_heads', [1, 4])
def test_float32_ids_are_transformers_own(kv_heads: int) -> None:
    model = tiny_llama(kv_heads=kv_heads).cuda().eval()
    first = assert_decoded(model)
    recorded(model)
    for prompt in ([*PROMPT, *first], PROMPT[:3], [*PROMPT, 8]):  # after what was seen already, and after less
        assert_decoded(model, prompt)
    long = Sampling(max_new_tokens=600, temperature=0)  # the cache has to grow
    assert generate(model, PROMPT, stop_ids=STOP, sampling=long)[:14] == generate(
        model, PROMPT, stop_ids=STOP, sampling=GREEDY
    )


@pytest.mark.parametrize('name', sorted(CONFIGS))
def test_internlm_in_every_form(tmp_path: Path, name: str) -> None:
    model = load_model(write_model(tmp_path, name), dtype=torch.float32, device='cuda')
    assert_decoded(model)
    recorded(model)


def test_adapters_come_and_go() -> None:
    adapted = with_adapter(tiny_llama().cuda(), rank=5).eval()
    with_it = assert_decoded(adapted)
    recorded(adapted)
    with adapted.disable_adapter():
        without = assert_decoded(adapted)
        recorded(adapted)
    assert assert_decoded(adapted) == with_it != without
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if 'lora_B' in name:
                parameter.mul_(-3)
    assert assert_decoded(adapted) != with_it


def test_four_bit_logits() -> None:
    """The table of 4-bit values is float16 in the kernel: 1e-4 off, half of what the test allows."""
    model = with_adapter(four_bit().cuda()).eval()
    exact = dequantised(model)(input_ids=torch.tensor([PROMPT], device='cuda')).logits[0, -1].detach()
    generate(model, PROMPT[:-1], stop_ids=STOP, sampling=GREEDY)
    decoder = recorded(model)
    with torch.inference_mode():
        decoder._ids = []
        decoder._prefill(PROMPT[:-1])
        decoder._step.token.fill_(PROMPT[-1])
        decoder._step.position.fill_(len(PROMPT) - 1)
        logits = decoder._step.replay()[0].double()
    assert float((logits - exact).norm() / exact.norm()) < 1e-3


def test_an_answer_that_was_stopped_spoils_nothing() -> None:
    class Streamer:
        def __init__(self) -> None:
            self.num = 0

        def put(self, value: torch.Tensor) -> None:
            self.num += 1
            if self.num == 6:
                raise KeyboardInterrupt

        def end(self) -> None:
            raise AssertionError

    model = tiny_llama().cuda().eval()
    expected = assert_decoded(model)
    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPT, stop_ids=STOP, sampling=DRAWN, streamer=Streamer())  # type: ignore[arg-type]
    assert_decoded(model, [*PROMPT, *expected[:5]])
    assert assert_decoded(model) == expected


def test_a_long_prompt_by_kernels() -> None:
    """As a whole; a second time with cached dequantized weights; and after a cached prefix."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    base = quantise(LlamaForCausalLM(config).cuda().bfloat16(), torch.bfloat16)
    model = with_adapter(base).bfloat16().eval()
    prompt = torch.randint(5, 97, (1300,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = torch.tensor([prompt], device='cuda')
    exact = dequantised(model)(input_ids=ids).logits[0, -1].detach()

    def error(logits: torch.Tensor) -> float:
        return float((logits.double() - exact).norm() / exact.norm())

    with torch.inference_mode():
        bound = 1.5 * error(model(input_ids=ids).logits[0, -1])
        decoder: Any = decoding.find_decoder(model, 1310)
        decoder._prepare(1310)
        whole = error(decoder._prefill(prompt)[0])
        assert all(p._cached_floats is not None for layer in decoder.layers for p in layer.products)
        decoder._ids = []
        again = error(decoder._prefill(prompt)[0])
        decoder._ids = []
        decoder._prefill([*prompt[:650], 3])
        behind = error(decoder._prefill(prompt)[0])
    assert max(whole, again, behind) < bound
