"""Drawing an answer, token by token."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from xtuner.inference.decode.decoder import SequenceDecoder, find_decoder, release
from xtuner.inference.detokenizer import TextStream

logger = logging.getLogger('xtuner')
_LOGGED_REASONS: set[str] = set()  # reasons for the slower way that were logged


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    Attributes:
        max_new_tokens: Most tokens of an answer, the stop token included.
        temperature: 0 takes the likeliest token each time.
        top_p: Tokens are drawn from the smallest set that has this share of the probability.
        seed: Makes the draws repeatable; None leaves torch's generator as it is.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.8
    top_p: float = 0.8
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """The keywords for transformers' `generate`."""
        if self.temperature == 0:
            return {'do_sample': False, 'temperature': None, 'top_p': None, 'top_k': None}
        return {'do_sample': True, 'temperature': self.temperature, 'top_p': self.top_p, 'top_k': 0}


def generate(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    streamer: TextStream | None = None,
    synced: bool = False,
) -> list[int]:
    """Continues a prompt.

    `inference.decode` decodes Llama-like models; transformers' `generate` decodes all others, and these where the fast
    decoder is unsupported. Both draw the same tokens from the same seed, as far as their logits agree.

    Args:
        model: A transformers or peft causal language model.
        prompt_ids: Token ids that end where the answer begins.
        stop_ids: Ids that end the answer.
        sampling: How to draw.
        streamer: Receives the ids as they come, as from transformers: the prompt once, then each id, then `end()`.
        synced: Whether all ranks of a run, which hold the weights together, do this: each computes as many tokens as
            the longest of their answers has.

    Returns:
        The answer's ids, with the stop id where one was drawn.
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    if synced:
        return generate_with_transformers(
            model, prompt_ids, stop_ids=stop_ids, sampling=sampling, streamer=streamer, synced=True
        )
    decoder = find_decoder(model, len(prompt_ids) + sampling.max_new_tokens)
    reason = decoder if isinstance(decoder, str) else 'there is not enough memory for a cache of fixed size'
    if isinstance(decoder, SequenceDecoder):
        answer = _generate_with_decoder(decoder, prompt_ids, frozenset(stop_ids), sampling, streamer)
        if answer is not None:
            return answer
        release(model)
        torch.cuda.empty_cache()
    if reason not in _LOGGED_REASONS:
        _LOGGED_REASONS.add(reason)
        logger.info('decoding by transformers, which is slower: %s', reason)
    return generate_with_transformers(model, prompt_ids, stop_ids=stop_ids, sampling=sampling, streamer=streamer)


@torch.inference_mode()
def warm_up(model: Any, num_tokens: int) -> None:
    """Draws a few tokens, with room for `num_tokens`, so that what is loaded at its first use is loaded.

    PyTorch's generators are left as they were. Models that are not decoded here are left alone.
    """
    prompt = [int(model.config.bos_token_id or 0)] * 16
    decoder = find_decoder(model, num_tokens)
    if isinstance(decoder, str) or num_tokens <= 2 * len(prompt):
        return
    devices = [model.device] if model.device.type == 'cuda' else []
    with torch.random.fork_rng(devices), decoder.lock, torch.autocast(model.device.type, enabled=False):
        max_new_tokens = num_tokens - len(prompt)
        with closing(decoder.answer(prompt, max_new_tokens=max_new_tokens, temperature=0.5, top_p=0.5)) as ids:
            for _, _ in zip(range(3), ids, strict=False):
                pass


@torch.inference_mode()
def _generate_with_decoder(
    decoder: SequenceDecoder,
    prompt_ids: Sequence[int],
    stop_ids: frozenset[int],
    sampling: Sampling,
    streamer: TextStream | None,
) -> list[int] | None:
    """The answer; None where there is too little memory to begin one."""
    answer: list[int] = []
    with decoder.lock, torch.autocast(decoder.device.type, enabled=False):
        ids = decoder.answer(
            prompt_ids, max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature, top_p=sampling.top_p
        )
        with closing(ids):
            try:
                first = next(ids)
            except torch.OutOfMemoryError:
                return None
            if streamer is not None:
                streamer.put(torch.tensor([list(prompt_ids)]))
            for token in chain([first], ids):
                answer.append(token)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
                if token in stop_ids:
                    break
    if streamer is not None:
        streamer.end()
    return answer


@torch.inference_mode()
def generate_with_transformers(
    model: Any,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Sequence[int],
    sampling: Sampling,
    streamer: TextStream | None = None,
    synced: bool = False,
) -> list[int]:
    """As `generate`, by transformers' own method; the seed is not looked at."""
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        streamer=streamer,
        synced_gpus=synced,
        **sampling.arguments(),
    )
    return output[0, len(prompt_ids) :].tolist()
