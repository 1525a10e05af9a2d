"""What the decoder's tests share: our ids against those of transformers' own `generate`."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_models import quantise, tiny_llama
from xtuner.inference.decode import decoder as decoding
from xtuner.inference.generate import Sampling, generate, generate_with_transformers
from xtuner.model.quantization import keep_plain_layout

PROMPT = [1, 5, 9, 33, 4, 70]
STOP = (96,)
GREEDY = Sampling(max_new_tokens=14, temperature=0)
DRAWN = Sampling(max_new_tokens=14, temperature=0.9, top_p=0.7, seed=3)


def four_bit(**shape: Any) -> Any:
    model = quantise(tiny_llama(**shape)).eval()
    keep_plain_layout(model)  # as `load_model` does
    return model


def plainly(model: Any, prompt: list[int], sampling: Sampling, stop: tuple[int, ...] = STOP) -> list[int]:
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    return generate_with_transformers(model, prompt, stop_ids=stop, sampling=sampling)


def assert_decoded(model: Any, prompt: list[int] = PROMPT, stop: tuple[int, ...] = STOP) -> list[int]:
    """Our ids are `generate`'s, and were not made by it."""
    causal = model.get_base_model() if hasattr(model, 'get_base_model') else model
    assert isinstance(decoding.find_decoder(model, len(prompt) + 14), decoding.SequenceDecoder)
    for sampling in (GREEDY, DRAWN):
        expected = plainly(model, prompt, sampling, stop)
        own = type(causal).generate
        type(causal).generate = None
        try:
            got = generate(model, prompt, stop_ids=stop, sampling=sampling)
        finally:
            type(causal).generate = own
        assert got == expected
    assert len(set(got)) > 3 or len(got) < 4  # what is drawn differs: one word for ever would hide a mistake
    return expected
