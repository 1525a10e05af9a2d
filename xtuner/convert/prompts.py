"""Token rows on which models are compared: the run's probe samples if recorded, else built-in texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.dataset.probe import read_probe

_TOKENS = 32  # maximum tokens of a built-in text
_SAMPLE_TOKENS = 128  # maximum tokens of a probe sample
_MAX_TOKENS = 512  # maximum tokens of all padded rows if no number was requested; bounds time and memory
_TEXTS = (
    'Write a haiku about the sea.', 'What is 17 times 23? Explain each step.', '请用一句话介绍杭州。',
    'def fibonacci(n):', 'The three largest cities of France are', 'Translate into German: I would like some tea.',
    '为什么天空是蓝色的？', 'List five uses of a paper clip.',
)  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens.

    Attributes:
        ids: int64 (N, S), padded on the right, which does not affect a causal model.
        counted: bool (N, S): positions whose next-token prediction is compared.
        source: Description for messages.
    """

    ids: Tensor
    counted: Tensor
    source: str


def choose_prompts(folder: Path, run: Path | None, number: int | None, vocab_size: int) -> Prompts:
    """Selects rows on which to compare models.

    Args:
        folder: The folder whose tokenizer encodes the built-in texts.
        run: A work folder that may contain probe samples; None: none.
        number: Number of rows; if samples and texts do not suffice, the rest are random ids. None: the samples that fit
            into `_MAX_TOKENS`, or four texts.
        vocab_size: Upper bound of the ids.
    """
    probe = read_probe(run, vocab_size) if run is not None else None
    samples = _cut(probe.samples, number) if probe else []
    if samples and probe and (number is None or len(samples) == number):
        return _rows([ids for ids, _ in samples], [trained for _, trained in samples],
                     f'{len(samples)} {probe.part} samples of the run')  # fmt: skip
    number = 4 if number is None else number
    from xtuner.model.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.tensor(tokenizer(text).input_ids[:_TOKENS]) for text in _TEXTS[: number - len(samples)]]
    more = number - len(samples) - len(rows)
    rows += [torch.randint(vocab_size, (_TOKENS,), generator=generator) for _ in range(more)]
    unmasked = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return _rows([*(ids for ids, _ in samples), *rows], [*(trained for _, trained in samples), *unmasked],
                 f'{len(samples) + len(rows)} prompts')  # fmt: skip


def _cut(samples: tuple[tuple[Tensor, Tensor], ...], number: int | None) -> list[tuple[Tensor, Tensor]]:
    """Truncates samples and keeps the first ones that still contain a trained token."""
    cut = [(ids[:_SAMPLE_TOKENS], trained[:_SAMPLE_TOKENS]) for ids, trained in samples]
    cut = [(ids, trained) for ids, trained in cut if trained[1:].any()]
    if number is not None:
        return cut[:number]
    kept: list[tuple[Tensor, Tensor]] = []
    longest = 0
    for ids, trained in cut:
        longest = max(longest, len(ids))
        if kept and longest * (len(kept) + 1) > _MAX_TOKENS:
            break
        kept.append((ids, trained))
    return kept


def _rows(ids: list[Tensor], masks: list[Tensor], source: str) -> Prompts:
    """Pads the rows; a masked-in token is compared where it is predicted, one position before."""
    counted = [torch.cat([mask[1:], mask[-1:] & mask[:1]]) for mask in masks]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return Prompts(padded, nn.utils.rnn.pad_sequence(counted, batch_first=True), source)
