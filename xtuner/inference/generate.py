"""Text generation for one prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from xtuner.errors import ModelError, one_line
from xtuner.inference.decode.decoder import SequenceDecoder, find_decoder, release
from xtuner.inference.detokenizer import TextStream

logger = logging.getLogger('xtuner')
_LOGGED_REASONS: set[str] = set()  # reasons for falling back to transformers that have been logged


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    Attributes:
        max_new_tokens: Maximum number of tokens of an answer, including the stop token.
        temperature: Sampling temperature; 0: greedy decoding.
        top_p: Samples from the smallest set of tokens whose probabilities sum to it.
        seed: Makes sampling reproducible; None: torch's generator is not seeded.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.8
    top_p: float = 0.8
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for transformers' `generate`."""
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
    """Generates the answer to a prompt.

    `inference.decode` decodes Llama-like models; for all others, and if it does not support a model's current state,
    this falls back to transformers' `generate`. Both sample the same tokens from the same seed, as far as their logits
    agree.

    Args:
        model: A transformers or peft causal language model.
        prompt_ids: Token ids of the prompt, up to the start of the answer.
        stop_ids: Token ids that end the answer.
        sampling: Sampling settings.
        streamer: Receives the ids as from transformers: the prompt once, then each id, then `end()`.
        synced: Whether all ranks of a run with sharded weights call this together: each computes as many tokens as the
            longest of their answers.

    Returns:
        Token ids of the answer, including the stop token if it was generated.
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    if synced:
        return generate_with_transformers(
            model, prompt_ids, stop_ids=stop_ids, sampling=sampling, streamer=streamer, synced=True
        )
    decoder = find_decoder(model, len(prompt_ids) + sampling.max_new_tokens)
    reason = decoder if isinstance(decoder, str) else 'not enough memory for a static KV cache'
    if isinstance(decoder, SequenceDecoder):
        answer = _generate_with_decoder(decoder, prompt_ids, frozenset(stop_ids), sampling, streamer)
        if answer is not None:
            return answer
        release(model)
        torch.cuda.empty_cache()
    if reason not in _LOGGED_REASONS:
        _LOGGED_REASONS.add(reason)
        logger.info('falling back to transformers.generate (slower): %s', reason)
    return generate_with_transformers(model, prompt_ids, stop_ids=stop_ids, sampling=sampling, streamer=streamer)


@torch.inference_mode()
def warm_up(model: Any, num_tokens: int) -> None:
    """Generates a few tokens with a KV cache for `num_tokens`, so that kernels are loaded and graphs recorded.

    Preserves the state of PyTorch's generators. Does nothing for models that `inference.decode` does not support.
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
    """The ids of the answer; None if there is not enough memory to start."""
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
    """Same as `generate`, by transformers' `generate`; ignores the seed.

    Raises:
        ModelError: transformers does not support generation with this type of model.
    """
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    try:
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
    except (AttributeError, NotImplementedError) as error:
        kind = model.config.model_type
        raise ModelError(f'transformers cannot generate with a model of type {kind!r}: {one_line(error)}') from error
    return output[0, len(prompt_ids) :].tolist()
