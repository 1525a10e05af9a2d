"""Compares a merged model with the trained model, its reference.

An adapter trained on a quantized base belongs to the quantized values, so the reference is that base with the adapter;
otherwise it is the published base with the adapter. The reference is computed by peft (`layerwise`), not by merge code.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtuner.adapters.delta import Rows
from xtuner.convert.base import PublishedBase, QuantizedBase, skeleton
from xtuner.convert.layerwise import Adapted, Layerwise, Opener
from xtuner.convert.prompts import Prompts
from xtuner.convert.shards import TensorPlan
from xtuner.convert.source import MergeSource
from xtuner.errors import ModelError
from xtuner.model.weights.reader import WeightReader, open_weights

logger = logging.getLogger('xtuner')

# Largest logit difference that rounding explains, in standard deviations of the logits. The relative rounding error of
# a weight is at most 2^-12 (float16), 2^-9 (bfloat16) or 2^-25; errors add up like random numbers over a layer's inputs
# and over the layers. Half of the change that training made to the logits is far larger.
TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.4, torch.float32: 1e-3}
LEAST_AGREEMENT = 0.95
MOST_KL = 0.002
"""Required agreement with the trained model if no base was named explicitly; docs/merge.md has the measurements."""


@dataclass(frozen=True)
class Comparison:
    """Difference between a model and the reference.

    Attributes:
        largest: The largest logit difference.
        deviation: Standard deviation of the reference's logits.
        agreement: Share of positions with the same most likely token.
        kl: Kullback-Leibler divergence of the next-token distribution from the reference's, averaged over positions, in
            nats.
        positions: Number of positions compared.
    """

    largest: float
    deviation: float
    agreement: float
    kl: float
    positions: int

    @property
    def keeps(self) -> bool:
        """Whether the model is close enough to count as the trained model."""
        return self.agreement >= LEAST_AGREEMENT and self.kl <= MOST_KL

    def __str__(self) -> str:
        return f'same likeliest token at {100 * self.agreement:.1f} %, KL {self.kl:.2g}'


def compare(reference: Tensor, other: Tensor) -> Comparison:
    """Compares logits, float32 (P, V), position by position."""
    same = (reference.argmax(-1) == other.argmax(-1)).double().mean()
    kl = F.kl_div(other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction='none').sum(-1)
    largest = (other - reference).abs().max()
    return Comparison(float(largest), float(reference.std()), float(same), max(0.0, float(kl.mean())), len(kl))


class Verifier:
    """Logits of base and adapters as computed by peft, on a set of prompts.

    Args:
        source: The merge, on the published base.
        plans: The tensors to be written.
        adapted: Base and adapters.
        prompts: The token rows.
    """

    def __init__(self, source: MergeSource, plans: Sequence[TensorPlan], adapted: Adapted, prompts: Prompts) -> None:
        self._source, self._adapted, self._prompts = source, adapted, prompts
        self._plans = {plan.name: plan for plan in plans}
        self._logits: dict[int, Tensor] = {}

    def on(self, base: PublishedBase | QuantizedBase) -> Tensor:
        """Returns logits (P, V) of the adapters on a base; cached."""
        if id(base) not in self._logits:
            rows = replace(self._source, base=base).rows
            logits = self._adapted.logits(rows, self._prompts.ids, self._source.device)
            self._logits[id(base)] = logits[self._prompts.counted]
        return self._logits[id(base)]

    def compare_bases(self, trained: QuantizedBase) -> Comparison:
        """Compares the adapters on the published base with those on the base used in training."""
        comparison = compare(self.on(trained), self.on(self._source.base))
        logger.info('compared with the adapter on the %d-bit base used in training, on %s, %d positions:',
                    trained.bits, self._prompts.source, comparison.positions)  # fmt: skip
        logger.info('  --base original: %s', comparison)
        return comparison

    def compare_merged(self, trained: QuantizedBase) -> Comparison:
        """Predicts the difference of a merge into the base used in training, before it is written."""
        source = replace(self._source, base=trained, written=[], unchanged=[])

        def open_merged(name: str) -> Rows:
            whole = torch.cat(list(source.merged(self._plans[name])))
            return lambda start, stop: whole[start:stop]

        merged = self._run(self._source.reader.folder, self._adapted.changes, open_merged)
        comparison = compare(self.on(trained), merged)
        logger.info('  --base dequantized: %s', comparison)
        return comparison

    def check(self, folder: Path, merged_on: PublishedBase | QuantizedBase, dtype: torch.dtype) -> Tensor:
        """Compares the written model with the adapters on its base; returns the written model's logits.

        Raises:
            ModelError: They differ by more than rounding explains.
        """
        written = self._run(folder, {}, _rows_of(open_weights(folder)))
        comparison = compare(self.on(merged_on), written)
        limit = TOLERANCE[dtype] * comparison.deviation
        logger.info(
            'verified on %s, %d positions: largest logit difference %.2g (logits spread %.2g, allowed %.2g), '
            'same likeliest token at %.1f %%', self._prompts.source, comparison.positions, comparison.largest,
            comparison.deviation, limit, 100 * comparison.agreement,
        )  # fmt: skip
        if not comparison.largest <= limit:
            raise ModelError(
                f'the merged model differs from base and adapter: logit difference {comparison.largest:.3g}, rounding '
                f'explains {limit:.3g}; same likeliest token at {100 * comparison.agreement:.1f} % of '
                f'{comparison.positions} positions. The output was removed; --verify 0 skips this check'
            )
        return written

    def _run(self, folder: Path, changes: Mapping[str, Any], rows: Opener) -> Tensor:
        model = Layerwise(skeleton(folder, changes), self._source.device)
        return model.logits(rows, self._prompts.ids)[self._prompts.counted]


def _rows_of(reader: WeightReader) -> Opener:
    return lambda name: lambda start, stop: reader.rows(name, start, stop)
