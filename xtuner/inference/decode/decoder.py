"""A decoder with its cache: continues one prompt at a time, and knows again what the last one began with."""

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
from xtuner.inference.decode.forward import LARGEST_CHUNK, Cache, advance, norm
from xtuner.inference.decode.layers import (
    adapters_on,
    all_modules,
    most_tokens,
    read_layers,
    rotary_table,
    state_of,
    unsupported_reason,
)
from xtuner.inference.decode.sampling import next_token
from xtuner.kernels.dispatch import fused_kernels, has_triton

if TYPE_CHECKING:
    from xtuner.inference.decode.graph import Mailbox, TokenStep

logger = logging.getLogger('xtuner')

_KEPT_SHARE = 0.25  # of the free memory, for weights kept as floats: on a CPU at once, on a GPU for long prompts
# Not cuDNN's, which plans anew for each length that it has not seen.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_WORTH_COMPILING = 512  # tokens of a prompt
_SMALLEST = 512  # tokens a cache has room for

_MOST_VARIANTS = 2  # of one model, by the adapters that are on: a base and its adapter side by side

_DECODERS: weakref.WeakKeyDictionary[nn.Module, list[Decoder]] = weakref.WeakKeyDictionary()


def find_decoder(model: Any, num_tokens: int) -> Decoder | str:
    """The decoder of a model, for the adapters that are on now; made where there is none, it goes with the model.

    Args:
        model: A transformers or peft causal language model.
        num_tokens: Of prompt and answer together.

    Returns:
        The decoder, or why there is none, in a few words.
    """
    causal = model.get_base_model() if hasattr(model, 'get_base_model') else model
    modules = all_modules(causal)
    adapters = adapters_on(modules)
    known = [decoder for decoder in _DECODERS.get(causal, []) if decoder.modules == modules]  # none was replaced
    found = next((decoder for decoder in known if decoder.adapters == adapters), None)
    if found is None:
        reason = unsupported_reason(causal)
        if reason:
            return reason
        known = known[-_MOST_VARIANTS + 1 :]
        found = Decoder(causal, modules, adapters)
    _DECODERS[causal] = [*(decoder for decoder in known if decoder is not found), found]
    return found.unsupported_reason(num_tokens) or found


def release(model: Any) -> None:
    """Gives back what decoding keeps for a model: its caches, weights as floats, recorded graphs."""
    _DECODERS.pop(model.get_base_model() if hasattr(model, 'get_base_model') else model, None)


class Decoder:
    """Decoding for one model.

    Holds the model's parts, not the model. One answer at a time: a second thread waits.

    Args:
        causal: A causal language model without `layers.unsupported_reason`, not wrapped by peft.
        modules: All modules inside it.
        adapters: What `adapters_on` says of them, as long as this decoder is used.
    """

    def __init__(self, causal: Any, modules: list[nn.Module], adapters: tuple) -> None:
        decoder = causal.get_decoder()
        self.lock = threading.Lock()
        self.modules, self.adapters = modules, adapters
        self._decoder = decoder
        self._head = causal.get_output_embeddings()
        self._trained = decoder.config.max_position_embeddings
        self._most_tokens = most_tokens(decoder)
        self._inside = [module for layer in decoder.layers for module in (layer, *all_modules(layer))]
        self.layers = read_layers(decoder)
        self._weight = decoder.norm.weight
        self._state: tuple | None = None
        self._cache: Cache | None = None
        self._ids: list[int] = []  # whose keys and values the cache holds
        self._step: TokenStep | None = None
        self._no_step: str | None = None
        self._mailbox: Mailbox | None = None
        self._fused = self._weight.is_cuda and has_triton()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._weight.device

    def unsupported_reason(self, num_tokens: int) -> str | None:
        """Why an answer cannot be decoded here now, in a few words; None where it can."""
        if self._decoder.training:
            return 'it is in training mode'
        if any(module._forward_hooks or module._forward_pre_hooks for module in self._inside):
            return 'a hook is registered inside a layer, which would not be called'
        if num_tokens > self._most_tokens:
            return (
                f'{num_tokens} tokens are more than the {self._trained} it was trained with; its rotary base grows then'
            )
        kind, dtype = self._weight.device.type, self._weight.dtype
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
            return f'autocast asks for {torch.get_autocast_dtype(kind)}, its weights are {dtype}'
        return None

    def answer(self, prompt: Sequence[int], *, max_new_tokens: int, temperature: float, top_p: float) -> Generator[int]:
        """Yields an answer's ids as they are drawn, without end but `max_new_tokens`; close it to stop.

        Args:
            prompt: Ids of the prompt, at least one.
            max_new_tokens: Most ids.
            temperature: See `next_token`.
            top_p: Likewise.
        """
        self._prepare(len(prompt) + max_new_tokens)
        logits = self._prefill(list(prompt))
        drawn = next_token(logits, temperature=temperature, top_p=top_p)
        yield int(drawn)
        if max_new_tokens > 1 and self._token_step() is not None:  # recorded after the first token is shown
            yield from self._run_ahead(drawn, max_new_tokens - 1, temperature, top_p)
            return
        for _ in range(max_new_tokens - 1):
            drawn = next_token(self._run([int(drawn)]), temperature=temperature, top_p=top_p)
            yield int(drawn)

    def _run_ahead(self, drawn: Tensor, num_tokens: int, temperature: float, top_p: float) -> Generator[int]:
        """Yields further tokens by recorded steps; the step after a token is under way while the host looks at it."""
        step, mailbox = self._step, self._mailbox
        assert step is not None and mailbox is not None
        step.token.copy_(drawn)
        step.position.fill_(len(self._ids))
        token, ticket = int(drawn), None
        for _ in range(num_tokens):
            drawn = next_token(step.replay(), temperature=temperature, top_p=top_p)
            step.token.copy_(drawn)
            previous, ticket = ticket, mailbox.send(drawn)
            if previous is not None:
                token = mailbox.receive(previous)
            self._ids.append(token)  # the step under way puts it into the cache
            if previous is not None:
                yield token
        assert ticket is not None
        yield mailbox.receive(ticket)

    def _token_step(self) -> TokenStep | None:
        """The recorded step, made at the first call; None where there can be none."""
        if not self._fused or self._cache is None:
            return None
        if self._step is None and self._no_step is None:
            from xtuner.inference.decode.graph import Mailbox, TokenStep

            try:
                step = TokenStep(self.layers, self._decoder, self._head, self._cache, self._angles)
                step.record(len(self._ids))
                self._step, self._mailbox = step, self._mailbox or Mailbox()
            except (
                Exception
            ) as error:  # a form that the kernels do not take, no memory, a GPU that Triton does not know
                self._no_step = ' '.join(str(error).split())[:200]
                logger.warning('decoding without recorded kernels, which is slower: %s', self._no_step)
        return self._step

    def _prepare(self, num_tokens: int) -> None:
        """Sees whether weights have changed, and makes room."""
        state = state_of(self.modules)
        if state != self._state:
            self._ids, self._state = [], None  # whoever is interrupted here begins here again
            self._step, self._no_step = None, None
            self._keep_weights()
            self._state = state
        if self._cache is None or self._cache.capacity < num_tokens:
            self._cache, self._step = None, None  # lets go of the memory before more is taken
            capacity = max(_SMALLEST, 1 << (num_tokens - 1).bit_length())
            capacity = max(num_tokens, min(capacity, self._trained))
            self._ids = []
            self._cache = Cache(self.layers, capacity, self._weight)
            self._angles = rotary_table(self._decoder, capacity, self.layers[0].heads.size)

    def _keep_weights(self) -> None:
        budget = int(free_bytes(self.device) * _KEPT_SHARE)
        for layer in self.layers:
            for product in layer.products:
                product.refresh()
                budget -= product.keep_floats(budget) if self.device.type == 'cuda' else product.keep(budget)

    def _prefill(self, prompt: list[int]) -> Tensor:
        """Logits (1, V) after the prompt; what it shares with the ids in the cache is not computed again."""
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, prompt[:-1], strict=False)))
        self._ids = self._ids[:shared]
        logits = None
        while len(self._ids) < len(prompt):
            logits = self._run(prompt[len(self._ids) : len(self._ids) + LARGEST_CHUNK])
        assert logits is not None
        return logits

    def _run(self, ids: list[int]) -> Tensor:
        assert self._cache is not None
        decoder = self._decoder
        x = decoder.embed_tokens(torch.tensor(ids, device=self._weight.device)).to(self._weight.dtype)
        # Triton's kernels take seconds where they have never been compiled: a short first prompt does without.
        fused = self._fused and (self._step is not None or len(ids) >= _WORTH_COMPILING)
        kernels = fused_kernels() if fused else None
        with sdpa_kernel(_ATTENTION):
            x = advance(self.layers, x, self._cache, len(self._ids), self._angles, kernels)
        self._ids += ids
        return self._head(norm(decoder.norm, x, kernels))
