"""Compares a written model with base and adapter, in the memory of its largest layer's block.

Both are run in float32 by the model's own code, module after module; a module's weights are read when its turn comes
and dropped after it. The adapter is not merged here: a layer adds `scale * up(down(x))` to what the base gives. So the
two differ by the rounding of the written weights alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.convert.base import skeleton
from xtuner.convert.combine import Combined, Weighted, combine
from xtuner.convert.delta import LowRank, Rows
from xtuner.convert.shards import row_blocks
from xtuner.errors import ModelError
from xtuner.model.tokenizer import load_tokenizer
from xtuner.model.weights import WeightReader, open_weights

logger = logging.getLogger('xtuner')

_BLOCK_ELEMENTS = 2**20  # of a weight at once; several threads compute on it
_TOKENS = 32  # most of a prompt
_PROMPTS = (
    'Write a haiku about the sea.', 'What is 17 times 23? Explain each step.', '请用一句话介绍杭州。',
    'def fibonacci(n):', 'The three largest cities of France are', 'Translate into German: I would like some tea.',
    '为什么天空是蓝色的？', 'List five uses of a paper clip.',
)  # fmt: skip
# Largest difference of a logit that rounding explains, in standard deviations of the logits. A weight rounded to
# nearest is off by at most 2^-12 (float16), 2^-9 (bfloat16) or 2^-25 of itself; the differences add up like random
# numbers over a layer's inputs and from layer to layer. Half of what training did to the logits is far above.
TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.4, torch.float32: 1e-3}


@dataclass(frozen=True)
class Comparison:
    """How far a written model is from base and adapter.

    Attributes:
        largest: The largest difference of a logit.
        deviation: Standard deviation of the logits.
        agreement: Share of the positions where both find the same token likeliest.
        positions: How many were compared.
    """

    largest: float
    deviation: float
    agreement: float
    positions: int


def verify_merge(
    base: Path,
    rows: Callable[[str], Rows],
    parts: Sequence[Weighted],
    merged: Path,
    num_prompts: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Runs both on prompts, and says how they differ.

    Args:
        base: The base model's folder.
        rows: Opens a tensor of the base.
        parts: The adapters.
        merged: The folder that was written.
        num_prompts: How many prompts.
        dtype: Of the written weights.
        device: Where to compute.

    Raises:
        ModelError: they differ by more than rounding explains.
    """
    found = compare(base, rows, parts, merged, num_prompts, device)
    limit = TOLERANCE[dtype] * found.deviation
    logger.info(
        'verified on %d prompts, %d positions: largest logit difference %.2g (logits spread %.2g, allowed %.2g), '
        'same likeliest token at %.1f %%', num_prompts, found.positions, found.largest, found.deviation, limit,
        100 * found.agreement,
    )  # fmt: skip
    if not found.largest <= limit:
        raise ModelError(
            f'the merged model differs from base and adapter: a logit by {found.largest:.3g}, where rounding explains '
            f'{limit:.3g}; same likeliest token at {100 * found.agreement:.1f} % of {found.positions} positions. '
            'Nothing was left; --verify 0 writes it all the same'
        )


@torch.inference_mode()
def compare(
    base: Path,
    rows: Callable[[str], Rows],
    parts: Sequence[Weighted],
    merged: Path,
    num_prompts: int,
    device: torch.device,
) -> Comparison:
    """The comparison that `verify_merge` makes; arguments as there."""
    written = open_weights(merged)
    model = skeleton(merged)
    ids, lengths = prompt_ids(merged, num_prompts, model.config.vocab_size)
    after = _run(model, _written(written), (), ids, device)
    model = skeleton(merged)
    before = _run(model, rows, parts, ids, device)
    mask = torch.arange(ids.shape[1])[None] < lengths[:, None]
    after, before = after[mask], before[mask]
    same = (after.argmax(-1) == before.argmax(-1)).double().mean()
    return Comparison(float((after - before).abs().max()), float(before.std()), float(same), int(mask.sum()))


def prompt_ids(folder: Path, num_prompts: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Prompts as ids.

    Returns:
        ids int64 (num_prompts, S), filled up at the right, where a causal model does not look back from; lengths
        int64 (num_prompts,). Beyond our own texts they are random ids.
    """
    tokenizer: Any = load_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.tensor(tokenizer(text).input_ids[:_TOKENS]) for text in _PROMPTS[:num_prompts]]
    more = [torch.randint(vocab_size, (_TOKENS,), generator=generator) for _ in range(num_prompts - len(texts))]
    ids = [*texts, *more]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(row) for row in ids])


def _written(reader: WeightReader) -> Callable[[str], Rows]:
    return lambda name: lambda start, stop: reader.rows(name, start, stop)


class _Weights:
    """A model's parameters, read when they are needed; adapters are added as far as a tensor is asked for whole."""

    def __init__(
        self, model: Any, rows: Callable[[str], Rows], parts: Sequence[Weighted], device: torch.device
    ) -> None:
        self._ties = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}
        self._rows, self._parts, self._device = rows, parts, device
        self._targets = set().union(*(part.adapter.targets for part in parts))

    def low_rank(self, name: str, shape: tuple[int, ...]) -> tuple[list[tuple[LowRank, float]], Combined]:
        """A tensor's plain low-rank updates, each with its weight, and its other changes."""
        name = self._ties.get(name, name)
        if name not in self._targets:
            return [], Combined(())
        deltas = combine(self._parts, name, lambda a, b: self._float(self._rows(name)(a, b)), shape).deltas
        plain = [(delta, w) for delta, w in deltas if isinstance(delta, LowRank) and delta.factor is None]
        others = [(delta, w) for delta, w in deltas if not (isinstance(delta, LowRank) and delta.factor is None)]
        return plain, Combined(tuple(others))

    def blocks(self, name: str, ranges: Iterable[tuple[int, int]], changes: Combined) -> Iterator[Tensor]:
        """Rows of a tensor, changed, in float32 on the device."""
        rows = self._rows(self._ties.get(name, name))
        for start, stop in ranges:
            block = self._float(rows(start, stop))
            yield changes.rows(block, start, stop) if changes.deltas else block

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor with all its changes."""
        plain, others = self.low_rank(name, shape)
        blocks = list(self.blocks(name, row_blocks(shape, _BLOCK_ELEMENTS), Combined((*others.deltas, *plain))))
        return torch.cat(blocks) if shape else blocks[0]

    def _float(self, rows: Tensor) -> Tensor:
        return rows.to(self._device, torch.float32)


def _run(
    model: Any, rows: Callable[[str], Rows], parts: Sequence[Weighted], ids: Tensor, device: torch.device
) -> Tensor:
    """Logits float32 (N, S, V), on the CPU, of a skeleton whose weights come from `rows` and `parts`."""
    weights = _Weights(model, rows, parts, device)
    module: Any
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        own = {name: f'{prefix}.{name}' for name, _ in module.named_parameters(recurse=False)}
        kind = type(module)
        if kind is nn.Linear:
            module.forward = partial(_linear, module, own, weights)
        elif kind is nn.Embedding:
            module.forward = partial(_embedding, module, own['weight'], weights)
        elif own:
            module.register_forward_pre_hook(partial(_fill, own, weights))
            module.register_forward_hook(_empty)
    return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def _linear(module: nn.Linear, own: Mapping[str, str], weights: _Weights, x: Tensor) -> Tensor:
    """A linear layer by blocks of its outputs; low-rank updates act on the input as in training."""
    shape = tuple(module.weight.shape)
    plain, others = weights.low_rank(own['weight'], shape)
    out = x.new_empty(*x.shape[:-1], shape[0])
    ranges = list(row_blocks(shape, _BLOCK_ELEMENTS))
    for (start, stop), block in zip(ranges, weights.blocks(own['weight'], ranges, others), strict=True):
        out[..., start:stop] = x @ block.T
    for delta, weight in plain:
        out += weight * delta.scale * ((x @ delta.down.T) @ delta.up.T)
    return out + weights.whole(own['bias'], (shape[0],)) if module.bias is not None else out


def _embedding(module: nn.Embedding, name: str, weights: _Weights, ids: Tensor) -> Tensor:
    """The rows that are asked for, one by one."""
    plain, others = weights.low_rank(name, tuple(module.weight.shape))
    words, places = ids.unique(return_inverse=True)
    ranges = [(word, word + 1) for word in words.tolist()]
    return F.embedding(places, torch.cat(list(weights.blocks(name, ranges, Combined((*others.deltas, *plain))))))


def _fill(own: Mapping[str, str], weights: _Weights, module: nn.Module, args: Any) -> None:
    for name, path in own.items():
        whole = weights.whole(path, tuple(module._parameters[name].shape))  # type: ignore[union-attr]
        module._parameters[name] = nn.Parameter(whole, requires_grad=False)


def _empty(module: nn.Module, args: Any, output: Any) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        module._parameters[name] = nn.Parameter(parameter.to('meta'), requires_grad=False)
