"""Batch decoding: a KV cache whose slots hold sequences of different lengths, and the forward passes that fill it.

A sequence keeps one slot from its first token to its last, with position p at index p. Sequences can therefore join or
leave between any two steps, there is no left padding, and no decode step computes more than one token per sequence:

    slot 0  t t t t t t .        decode step: the new token of each slot is written at its own length
    slot 1  t t . . . . .        and attends to the positions up to it
    slot 2  t t t t . . .

Shape letters: B slots of a pass, S new tokens per slot, L attended positions, V vocabulary size.
"""

# transformers types its caches for internal use; mypy's findings on overridden methods can be ignored.
# mypy: disable-error-code="override"

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from xtuner.errors import ModelError, one_line
from xtuner.inference.batch_graphs import StepGraphs

_SUPPORTED_LAYERS = {'full_attention', 'sliding_attention'}
_LENGTH_MULTIPLE = 32  # attended positions are rounded up to a multiple of it: attention kernels require aligned masks


class _ActiveSlots:
    """The part of the KV cache that the current pass writes and attends to; shared by all layers."""

    def __init__(self) -> None:
        self.slots = slice(0, 0)
        self.length = 0
        self.start: int | None = 0  # where all slots write; None: each at its own position
        self.positions = torch.zeros(0, 1, dtype=torch.long)  # (B, 1), of the first new token of each slot
        self.slot_indices = torch.zeros(0, dtype=torch.long)  # (B,)


class _SlotCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, positions, head size), allocated at the first update."""

    is_sliding = False
    is_compileable = True

    def __init__(self, num_slots: int, max_length: int, active: _ActiveSlots) -> None:
        super().__init__()
        self._shape, self._active = (num_slots, max_length), active

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates all slots."""
        (num_slots, length), like = self._shape, (key_states, value_states)
        self.keys, self.values = (x.new_zeros(num_slots, x.shape[1], length, x.shape[3]) for x in like)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values, (B, H, S, D); returns views of all attended positions, (B, H, L, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        active = self._active
        for cache, new in ((self.keys, key_states), (self.values, value_states)):
            if active.start is None:
                cache[active.slot_indices, :, active.positions[:, 0]] = new[:, :, 0].to(cache.dtype)
            else:
                cache[active.slots, :, active.start : active.start + new.shape[2]] = new
        return self.keys[active.slots, :, : active.length], self.values[active.slots, :, : active.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of attended positions, and the first of them."""
        return self._active.length, 0

    def get_seq_length(self) -> Any:
        """Number of tokens in each slot before the pass, int64 (B, 1)."""
        return self._active.positions

    def get_max_length(self) -> int:
        """Number of positions per slot."""
        return self._shape[1]


class _SlotCache(Cache):
    """The KV cache in transformers' interface.

    Args:
        layers: One `_SlotCacheLayer` per layer.
        rotated: Whether cached keys are rotated, since no sequence can become so long that the RoPE base changes.
    """

    def __init__(self, layers: list[Any], *, rotated: bool) -> None:
        super().__init__(layers=layers)
        self.rotated = rotated


class BatchDecoder:
    """Runs a model on the slots of one KV cache.

    Args:
        model: A transformers or peft causal language model with attention in all layers.
        num_slots: Maximum number of concurrent sequences.
        max_length: Maximum tokens of a sequence, including its prompt.

    Raises:
        ModelError: the model has other layers (recurrent ones, an encoder), or does not accept this KV cache.
    """

    def __init__(self, model: Any, *, num_slots: int, max_length: int) -> None:
        self.num_slots, self.max_length = num_slots, max_length
        self.model = model
        config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, 'layer_types', None) or ['full_attention'])
        if kinds - _SUPPORTED_LAYERS or getattr(config, 'is_encoder_decoder', False):
            other = ', '.join(sorted(kinds - _SUPPORTED_LAYERS)) or 'an encoder'
            raise ModelError(f'batch decoding does not support models of type {config.model_type!r}: it has {other}')
        self._mixed = 'sliding_attention' in kinds and len(kinds) > 1
        self._sliding = config.sliding_window if kinds == {'sliding_attention'} or self._mixed else None
        if getattr(config, 'layer_types', None) is None and getattr(config, 'sliding_window', None):
            self._sliding = config.sliding_window  # of all layers, as in Mistral
        self._active = _ActiveSlots()
        self._graphs: StepGraphs | None = None
        layers: list[Any] = [
            _SlotCacheLayer(num_slots, max_length, self._active) for _ in range(config.num_hidden_layers)
        ]
        self._cache = _SlotCache(layers, rotated=max_length <= getattr(config, 'max_position_embeddings', 0))
        try:
            self.prefill([[0]], slot=0)  # allocates the KV cache before the first request
            is_complete = all(layer.is_initialized for layer in layers)
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
            raise ModelError(
                f'batch decoding does not support models of type {config.model_type!r}: its attention does not accept '
                f'the KV cache ({one_line(error)}); use `xtuner chat`'
            ) from error
        if not is_complete:
            raise ModelError(
                f'batch decoding does not support models of type {config.model_type!r}: some of its layers share their '
                'KV cache; use `xtuner chat`'
            )
        if model.device.type == 'cuda':
            self._graphs = StepGraphs(
                self._decode_step, num_slots=num_slots, max_length=max_length, device=model.device
            )

    @property
    def cache_bytes(self) -> int:
        """Size of the KV cache in bytes."""
        layers: list[Any] = list(self._cache.layers)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[Sequence[int]], *, slot: int, start: int = 0) -> Tensor:
        """Processes prompts, or chunks of them, in consecutive slots.

        Args:
            ids: New token ids of each slot; padded on the right to equal lengths, which nothing attends to.
            slot: The first slot.
            start: Number of tokens already in each of these slots, the same for all.

        Returns:
            Logits after the last id of each slot, float32 (B, V).
        """
        lengths = [len(one) for one in ids]
        size = max(lengths)
        device = self.model.device
        padded = torch.tensor([[*one, *[0] * (size - len(one))] for one in ids], device=device)
        positions = torch.arange(start, start + size, device=device).expand(len(ids), -1)
        self._select(slot, positions, start, start + size)
        last_indices = sorted({length - 1 for length in lengths})
        logits = self._forward(padded, positions, torch.tensor(last_indices, device=device))
        chosen = [last_indices.index(length - 1) for length in lengths]
        return logits[range(len(ids)), chosen].float()

    @torch.inference_mode()
    def step(
        self, ids: Sequence[int], lengths: Sequence[int], *, slot: int, exclusive: bool = False, key: Hashable = None
    ) -> Tensor:
        """Runs one decode step for consecutive slots.

        Args:
            ids: The new token id of each slot.
            lengths: Number of tokens already in each slot.
            slot: The first slot.
            exclusive: Whether no other slot is in use; on a GPU the step is then replayed as a CUDA graph.
            key: The active adapter, if any: each has its own graphs.

        Returns:
            Logits, float32 (B, V), valid until the next step.
        """
        if self._graphs is not None and exclusive and slot == 0:
            logits = self._graphs.step(ids, lengths, key)
            if logits is not None:
                return logits
        device = self.model.device
        both = torch.tensor([list(ids), list(lengths)], device=device)
        return self._decode_step(both[0][:, None], both[1][:, None], max(lengths) + 1, slot)

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot to another."""
        layers: list[Any] = list(self._cache.layers)
        for layer in layers:
            for cache in (layer.keys, layer.values):
                cache[target, :, :length] = cache[source, :, :length]

    @torch.inference_mode()
    def _decode_step(self, ids: Tensor, positions: Tensor, length: int, slot: int = 0) -> Tensor:
        self._select(slot, positions, None, length)
        return self._forward(ids, positions, 1)[:, -1].float()

    def _select(self, slot: int, positions: Tensor, start: int | None, length: int) -> None:
        active = self._active
        active.slots = slice(slot, slot + len(positions))
        active.start = start
        active.length = min(-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self.max_length)
        active.positions = positions[:, :1]
        active.slot_indices = torch.arange(slot, slot + len(positions), device=positions.device)

    def _forward(self, ids: Tensor, positions: Tensor, logits_to_keep: Tensor | int) -> Tensor:
        dtype = self.model.dtype
        is_half = dtype != torch.float32
        with torch.autocast(ids.device.type, dtype, enabled=is_half, cache_enabled=False):
            return self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._masks(positions, dtype),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits

    def _masks(self, positions: Tensor, dtype: torch.dtype) -> Any:
        """Additive attention masks, (B, 1, S, L): 0 for visible positions, the minimum of the dtype for others."""
        key_positions = torch.arange(self._active.length, device=positions.device)
        visible = key_positions <= positions[:, :, None]
        full = _additive(visible, dtype)
        if self._sliding is None:
            return full
        near = _additive(visible & (key_positions > positions[:, :, None] - self._sliding), dtype)
        return {'full_attention': full, 'sliding_attention': near} if self._mixed else near


def _additive(visible_BSL: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible_BSL.shape, dtype=dtype, device=visible_BSL.device)
    return mask.masked_fill_(~visible_BSL, torch.finfo(dtype).min)[:, None]
