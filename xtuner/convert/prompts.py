"""The tokens on which models are compared: a run's own samples where it has recorded some, else texts of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.dataset.probe import read_probe

_TOKENS = 32  # most of a text of ours
_SAMPLE_TOKENS = 128  # most of a run's sample
_MOST_TOKENS = 512  # of all rows together, filled up, where no number was asked for: bounds time and memory
_TEXTS = (
    'Write a haiku about the sea.', 'What is 17 times 23? Explain each step.', '请用一句话介绍杭州。',
    'def fibonacci(n):', 'The three largest cities of France are', 'Translate into German: I would like some tea.',
    '为什么天空是蓝色的？', 'List five uses of a paper clip.',
)  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens.

    Attributes:
        ids: int64 (N, S), filled up at the right, where a causal model does not look back from.
        counted: bool (N, S): where the prediction of the next token is compared.
        source: What they are, for a message.
    """

    ids: Tensor
    counted: Tensor
    source: str


def choose_prompts(folder: Path, run: Path | None, number: int | None, vocab_size: int) -> Prompts:
    """Rows to compare models on.

    Args:
        folder: Whose tokenizer encodes our texts.
        run: A work folder that may hold a run's samples; None: none.
        number: How many rows; those that samples and texts do not give are random ids. None: the samples that fit into
            `_MOST_TOKENS`, or four texts.
        vocab_size: Ids are below it.
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
    everywhere = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return _rows([*(ids for ids, _ in samples), *rows], [*(trained for _, trained in samples), *everywhere],
                 f'{len(samples) + len(rows)} prompts')  # fmt: skip


def _cut(samples: tuple[tuple[Tensor, Tensor], ...], number: int | None) -> list[tuple[Tensor, Tensor]]:
    """The first samples, cut, of which a trained token is left."""
    cut = [(ids[:_SAMPLE_TOKENS], trained[:_SAMPLE_TOKENS]) for ids, trained in samples]
    cut = [(ids, trained) for ids, trained in cut if trained[1:].any()]
    if number is not None:
        return cut[:number]
    kept: list[tuple[Tensor, Tensor]] = []
    longest = 0
    for ids, trained in cut:
        longest = max(longest, len(ids))
        if kept and longest * (len(kept) + 1) > _MOST_TOKENS:
            break
        kept.append((ids, trained))
    return kept


def _rows(ids: list[Tensor], wanted: list[Tensor], source: str) -> Prompts:
    """Fills up; a wanted token is compared where it is predicted, one place before, and a text's last place too."""
    places = [torch.cat([mask[1:], mask[-1:] & mask[:1]]) for mask in wanted]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return Prompts(padded, nn.utils.rnn.pad_sequence(places, batch_first=True), source)
