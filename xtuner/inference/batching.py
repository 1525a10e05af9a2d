"""Decoding many texts at once: a cache whose rows have lengths of their own, and the two passes that fill it.

A text keeps one row from its first token to its last, position p at place p. So a text can join or leave between any
two steps, nothing is padded at the left, and no step computes more than one token of each text:

    row 0   t t t t t t .        step: each row's new token is written at its own length,
    row 1   t t . . . . .        and sees the places up to it
    row 2   t t t t . . .

Letters of shapes: B rows of a pass, S new tokens of each, L places that the pass looks at, V words.
"""

# transformers types its caches for its own use; what mypy misses where they are overridden is of no consequence.
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
_LENGTH_MULTIPLE = 32  # a pass looks at a multiple of so many places: attention kernels want aligned masks


class _ActiveSlots:
    """Which part of the store the pass under way writes and sees; shared by all layers."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.length = 0
        self.start: int | None = 0  # where all rows write, or None: each at its own position
        self.positions = torch.zeros(0, 1, dtype=torch.long)  # (B, 1), of each row's first new token
        self.numbers = torch.zeros(0, dtype=torch.long)  # (B,), of the rows


class _SlotCacheLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, places, size), made when the first ones come."""

    is_sliding = False
    is_compileable = True

    def __init__(self, num_rows: int, max_length: int, active: _ActiveSlots) -> None:
        super().__init__()
        self._shape, self._active = (num_rows, max_length), active

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Makes room for all rows."""
        (rows, length), like = self._shape, (key_states, value_states)
        self.keys, self.values = (x.new_zeros(rows, x.shape[1], length, x.shape[3]) for x in like)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new keys and values, (B, H, S, D), and returns views of all that the pass sees, (B, H, L, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        active = self._active
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if active.start is None:
                store[active.numbers, :, active.positions[:, 0]] = new[:, :, 0].to(store.dtype)
            else:
                store[active.rows, :, active.start : active.start + new.shape[2]] = new
        return self.keys[active.rows, :, : active.length], self.values[active.rows, :, : active.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Places seen and the first of them."""
        return self._active.length, 0

    def get_seq_length(self) -> Any:
        """The position of each row's first new token, int64 (B, 1): what stood in the cache before the pass."""
        return self._active.positions

    def get_max_length(self) -> int:
        """Places of a row."""
        return self._shape[1]


class _SlotCache(Cache):
    """The store as the model sees it.

    Args:
        layers: One a layer.
        rotated: No text can be so long that rotary positions of an earlier token would change.
    """

    def __init__(self, layers: list[Any], *, rotated: bool) -> None:
        super().__init__(layers=layers)
        self.rotated = rotated


class BatchDecoder:
    """Runs a model on the rows of one store.

    Args:
        model: A transformers or peft causal language model whose layers all attend.
        num_rows: Texts at a time.
        max_length: Tokens of a text, its prompt included.

    Raises:
        ModelError: the model has layers of another kind (recurrent ones, an encoder).
    """

    def __init__(self, model: Any, *, num_rows: int, max_length: int) -> None:
        self.num_rows, self.max_length = num_rows, max_length
        self.model = model
        config = model.config.get_text_config(decoder=True)
        kinds = set(getattr(config, 'layer_types', None) or ['full_attention'])
        if kinds - _SUPPORTED_LAYERS or getattr(config, 'is_encoder_decoder', False):
            other = ', '.join(sorted(kinds - _SUPPORTED_LAYERS)) or 'an encoder'
            raise ModelError(f'a model of type {config.model_type!r} cannot be decoded in batches: it has {other}')
        self._mixed = 'sliding_attention' in kinds and len(kinds) > 1
        self._sliding = config.sliding_window if kinds == {'sliding_attention'} or self._mixed else None
        if getattr(config, 'layer_types', None) is None and getattr(config, 'sliding_window', None):
            self._sliding = config.sliding_window  # of all layers, as in Mistral
        self._active = _ActiveSlots()
        self._graphs: StepGraphs | None = None
        layers: list[Any] = [
            _SlotCacheLayer(num_rows, max_length, self._active) for _ in range(config.num_hidden_layers)
        ]
        self._cache = _SlotCache(layers, rotated=max_length <= getattr(config, 'max_position_embeddings', 0))
        try:
            self.prefill([[0]], row=0)  # makes the store: what it needs is known before anyone waits for it
            made = all(layer.is_initialized for layer in layers)
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:
            raise ModelError(
                f'a model of type {config.model_type!r} cannot be decoded in batches, its attention takes no cache of '
                f'ours ({one_line(error)}); `xtuner chat` answers with it'
            ) from error
        if not made:
            raise ModelError(
                f'a model of type {config.model_type!r} cannot be decoded in batches: some of its layers share their '
                'cache; `xtuner chat` answers with it'
            )
        if model.device.type == 'cuda':
            self._graphs = StepGraphs(self._decode_step, num_rows=num_rows, max_length=max_length, device=model.device)

    @property
    def store_bytes(self) -> int:
        """Size of the store."""
        layers: list[Any] = list(self._cache.layers)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    @torch.inference_mode()
    def prefill(self, ids: Sequence[Sequence[int]], *, row: int, start: int = 0) -> Tensor:
        """Reads (a part of) the prompts of neighbouring rows.

        Args:
            ids: The new ids of each row; of unequal lengths, they are padded at the right, where nothing sees it.
            row: The first of the rows.
            start: How many ids of these rows were read before, the same for all.

        Returns:
            float32 (B, V): what follows the last id of each row.
        """
        lengths = [len(one) for one in ids]
        size = max(lengths)
        device = self.model.device
        padded = torch.tensor([[*one, *[0] * (size - len(one))] for one in ids], device=device)
        positions = torch.arange(start, start + size, device=device).expand(len(ids), -1)
        self._select(row, positions, start, start + size)
        kept = sorted({length - 1 for length in lengths})
        logits = self._forward(padded, positions, torch.tensor(kept, device=device))
        chosen = [kept.index(length - 1) for length in lengths]
        return logits[range(len(ids)), chosen].float()

    @torch.inference_mode()
    def step(
        self, ids: Sequence[int], lengths: Sequence[int], *, row: int, alone: bool = False, key: Hashable = None
    ) -> Tensor:
        """Reads one more id of each of some neighbouring rows.

        Args:
            ids: The new id of each row.
            lengths: How many ids each row holds already.
            row: The first of the rows.
            alone: Whether no other row is in use: then, on a GPU, the step is replayed from a recording.
            key: Which adapter is active, if any: each has its own recordings.

        Returns:
            float32 (B, V): what follows, valid until the next step.
        """
        if self._graphs is not None and alone and row == 0:
            logits = self._graphs.step(ids, lengths, key)
            if logits is not None:
                return logits
        device = self.model.device
        both = torch.tensor([list(ids), list(lengths)], device=device)
        return self._decode_step(both[0][:, None], both[1][:, None], max(lengths) + 1, row)

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` places of one row to another."""
        layers: list[Any] = list(self._cache.layers)
        for layer in layers:
            for store in (layer.keys, layer.values):
                store[target, :, :length] = store[source, :, :length]

    @torch.inference_mode()
    def _decode_step(self, ids: Tensor, positions: Tensor, length: int, row: int = 0) -> Tensor:
        self._select(row, positions, None, length)
        return self._forward(ids, positions, 1)[:, -1].float()

    def _select(self, row: int, positions: Tensor, start: int | None, length: int) -> None:
        active = self._active
        active.rows = slice(row, row + len(positions))
        active.start = start
        active.length = min(-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE, self.max_length)
        active.positions = positions[:, :1]
        active.numbers = torch.arange(row, row + len(positions), device=positions.device)

    def _forward(self, ids: Tensor, positions: Tensor, logits_to_keep: Tensor | int) -> Tensor:
        dtype = self.model.dtype
        on = dtype != torch.float32
        with torch.autocast(ids.device.type, dtype, enabled=on, cache_enabled=False):
            return self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._masks(positions, dtype),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            ).logits

    def _masks(self, positions: Tensor, dtype: torch.dtype) -> Any:
        """What is added to the scores, (B, 1, S, L): 0 where a place is seen, the least number where not."""
        key_positions = torch.arange(self._active.length, device=positions.device)
        seen = key_positions <= positions[:, :, None]
        full = _additive(seen, dtype)
        if self._sliding is None:
            return full
        near = _additive(seen & (key_positions > positions[:, :, None] - self._sliding), dtype)
        return {'full_attention': full, 'sliding_attention': near} if self._mixed else near


def _additive(seen_BSL: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(seen_BSL.shape, dtype=dtype, device=seen_BSL.device)
    return mask.masked_fill_(~seen_BSL, torch.finfo(dtype).min)[:, None]
