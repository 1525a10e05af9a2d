"""Decodes one sequence at a time with a static KV cache, and reuses the cached prefix of the previous prompt."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Generator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from xtuner.fused.offload import free_bytes
from xtuner.inference.decode.forward import PREFILL_CHUNK, KVCache, forward_layers, norm
from xtuner.inference.decode.layers import (
    adapter_state,
    max_tokens,
    read_layers,
    rotary_table,
    submodules,
    unsupported_reason,
    weight_state,
)
from xtuner.inference.decode.sampling import next_token
from xtuner.kernels.dispatch import fused_kernels, has_triton

if TYPE_CHECKING:
    from xtuner.inference.decode.graph import AsyncTokenReader, DecodeStep

logger = logging.getLogger('xtuner')

_CACHE_FRACTION = 0.25  # of the free memory, for dequantized weights: at once on a CPU, at long prompts on a GPU
# Without cuDNN, which builds a new plan for every new length.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_MIN_COMPILED_PROMPT = 512  # tokens; a shorter first prompt is not worth compiling Triton kernels for
_MIN_CAPACITY = 512  # tokens; minimum capacity of a KV cache
_MAX_VARIANTS = 2  # decoders per model, one for each set of active adapters: usually base and adapter

_DECODERS: weakref.WeakKeyDictionary[nn.Module, list[SequenceDecoder]] = weakref.WeakKeyDictionary()


def find_decoder(model: Any, num_tokens: int) -> SequenceDecoder | str:
    """Returns the decoder of a model for its active adapters, creating it if needed; it is freed with the model.

    Args:
        model: A transformers or peft causal language model.
        num_tokens: Tokens of prompt and answer together.

    Returns:
        The decoder, or the reason why the model is unsupported, in a few words.
    """
    causal = model.get_base_model() if hasattr(model, 'get_base_model') else model
    modules = submodules(causal)
    adapters = adapter_state(modules)
    decoders = [
        decoder for decoder in _DECODERS.get(causal, []) if decoder.modules == modules
    ]  # no module has been replaced
    found = next((decoder for decoder in decoders if decoder.adapters == adapters), None)
    if found is None:
        reason = unsupported_reason(causal)
        if reason:
            return reason
        decoders = decoders[-_MAX_VARIANTS + 1 :]
        found = SequenceDecoder(causal, modules, adapters)
    _DECODERS[causal] = [*(decoder for decoder in decoders if decoder is not found), found]
    return found.unsupported_reason(num_tokens) or found


def release(model: Any) -> None:
    """Frees what decoding holds for a model: KV caches, dequantized weights, CUDA graphs."""
    _DECODERS.pop(model.get_base_model() if hasattr(model, 'get_base_model') else model, None)


class SequenceDecoder:
    """Decodes one sequence at a time with one model.

    Holds references to the model's modules, not to the model. Callers must hold `lock` while decoding.

    Args:
        causal: A causal language model without `layers.unsupported_reason`, not wrapped by peft.
        modules: All its submodules.
        adapters: Their `adapter_state`, constant while this decoder is used.
    """

    def __init__(self, causal: Any, modules: list[nn.Module], adapters: tuple) -> None:
        decoder = causal.get_decoder()
        self.lock = threading.Lock()
        self.modules, self.adapters = modules, adapters
        self._decoder = decoder
        self._head = causal.get_output_embeddings()
        self._trained = decoder.config.max_position_embeddings
        self._max_tokens = max_tokens(decoder)
        self._layer_modules = [module for layer in decoder.layers for module in (layer, *submodules(layer))]
        self.layers = read_layers(decoder)
        self._weight = decoder.norm.weight
        self._state: tuple | None = None
        self._cache: KVCache | None = None
        self._ids: list[int] = []  # token ids in the KV cache
        self._step: DecodeStep | None = None
        self._step_disabled_reason: str | None = None
        self._token_reader: AsyncTokenReader | None = None
        self._fused = self._weight.is_cuda and has_triton()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self._weight.device

    def unsupported_reason(self, num_tokens: int) -> str | None:
        """Why the next answer cannot be decoded here, in a few words; None if it can."""
        if self._decoder.training:
            return 'the model is in training mode'
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._layer_modules):
            return 'a hook is registered inside a layer and would not be called'
        if num_tokens > self._max_tokens:
            return f'{num_tokens} tokens exceed the trained length {self._trained}, beyond which its RoPE base changes'
        kind, dtype = self._weight.device.type, self._weight.dtype
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
            return f'the autocast dtype is {torch.get_autocast_dtype(kind)}, the weights are {dtype}'
        return None

    def answer(self, prompt: Sequence[int], *, max_new_tokens: int, temperature: float, top_p: float) -> Generator[int]:
        """Yields the ids of an answer as they are generated, up to `max_new_tokens`; close the generator to stop.

        Args:
            prompt: Ids of the prompt, at least one.
            max_new_tokens: Maximum number of ids.
            temperature: See `next_token`.
            top_p: See `next_token`.
        """
        self._prepare(len(prompt) + max_new_tokens)
        logits = self._prefill(list(prompt))
        drawn = next_token(logits, temperature=temperature, top_p=top_p)
        yield int(drawn)
        if max_new_tokens > 1 and self._recorded_step() is not None:  # recorded after the first token has been yielded
            yield from self._run_ahead(drawn, max_new_tokens - 1, temperature, top_p)
            return
        for _ in range(max_new_tokens - 1):
            drawn = next_token(self._run([int(drawn)]), temperature=temperature, top_p=top_p)
            yield int(drawn)

    def _run_ahead(self, drawn: Tensor, num_tokens: int, temperature: float, top_p: float) -> Generator[int]:
        """Yields further tokens from recorded steps; the next step runs while the host processes the current token."""
        step, reader = self._step, self._token_reader
        assert step is not None and reader is not None
        step.token.copy_(drawn)
        step.position.fill_(len(self._ids))
        token, index = int(drawn), None
        for _ in range(num_tokens):
            drawn = next_token(step.replay(), temperature=temperature, top_p=top_p)
            step.token.copy_(drawn)
            previous, index = index, reader.enqueue(drawn)
            if previous is not None:
                token = reader.wait(previous)
            self._ids.append(token)  # the running step adds it to the KV cache
            if previous is not None:
                yield token
        assert index is not None
        yield reader.wait(index)

    def _recorded_step(self) -> DecodeStep | None:
        """The recorded decode step, created at the first call; None if unsupported."""
        if not self._fused or self._cache is None:
            return None
        if self._step is None and self._step_disabled_reason is None:
            from xtuner.inference.decode.graph import AsyncTokenReader, DecodeStep

            try:
                step = DecodeStep(self.layers, self._decoder, self._head, self._cache, self._angles)
                step.record(len(self._ids))
                self._step, self._token_reader = step, self._token_reader or AsyncTokenReader()
            except Exception as error:  # an unsupported shape, out of memory, a GPU that Triton does not support
                self._step_disabled_reason = ' '.join(str(error).split())[:200]
                logger.warning('Triton kernels disabled for decoding (slower): %s', self._step_disabled_reason)
        return self._step

    def _prepare(self, num_tokens: int) -> None:
        """Checks whether weights have changed, and allocates the KV cache."""
        state = weight_state(self.modules)
        if state != self._state:
            self._ids, self._state = [], None  # if interrupted, the next call starts over
            self._step, self._step_disabled_reason = None, None
            self._cache_weights()
            self._state = state
        if self._cache is None or self._cache.capacity < num_tokens:
            self._cache, self._step = None, None  # frees the memory before more is allocated
            capacity = max(_MIN_CAPACITY, 1 << (num_tokens - 1).bit_length())
            capacity = max(num_tokens, min(capacity, self._trained))
            self._ids = []
            self._cache = KVCache(self.layers, capacity, self._weight)
            self._angles = rotary_table(self._decoder, capacity, self.layers[0].heads.size)

    def _cache_weights(self) -> None:
        budget = int(free_bytes(self.device) * _CACHE_FRACTION)
        for layer in self.layers:
            for product in layer.products:
                product.refresh()
                budget -= (
                    product.allow_cached_floats(budget) if self.device.type == 'cuda' else product.cache_merged(budget)
                )

    def _prefill(self, prompt: list[int]) -> Tensor:
        """Logits (1, V) after the prompt; the prefix that is in the KV cache is not recomputed."""
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, prompt[:-1], strict=False)))
        self._ids = self._ids[:shared]
        logits = None
        while len(self._ids) < len(prompt):
            logits = self._run(prompt[len(self._ids) : len(self._ids) + PREFILL_CHUNK])
        assert logits is not None
        return logits

    def _run(self, ids: list[int]) -> Tensor:
        assert self._cache is not None
        decoder = self._decoder
        x = decoder.embed_tokens(torch.tensor(ids, device=self._weight.device)).to(self._weight.dtype)
        # Compiling Triton kernels takes seconds: a short first prompt runs without them.
        fused = self._fused and (self._step is not None or len(ids) >= _MIN_COMPILED_PROMPT)
        kernels = fused_kernels() if fused else None
        with sdpa_kernel(_ATTENTION):
            x = forward_layers(self.layers, x, self._cache, len(self._ids), self._angles, kernels)
        self._ids += ids
        return self._head(norm(decoder.norm, x, kernels))
