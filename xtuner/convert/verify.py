"""How near a merged model is to the one that was trained: its reference.

An adapter that was trained on a quantised base belongs to those values, so the reference is *that* base with the
adapter; else it is the published base with it. The reference is computed by peft (`layerwise`), not by what merges.
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

# Largest difference of a logit that rounding explains, in standard deviations of the logits. A weight rounded to
# nearest is off by at most 2^-12 (float16), 2^-9 (bfloat16) or 2^-25 of itself; the differences add up like random
# numbers over a layer's inputs and from layer to layer. Half of what training did to the logits is far above.
TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.4, torch.float32: 1e-3}
LEAST_AGREEMENT = 0.95
MOST_KL = 0.002
"""What a merge that was not told its base must reach against the trained model; docs/merge.md has the measurements."""


@dataclass(frozen=True)
class Comparison:
    """How far a model is from the reference.

    Attributes:
        largest: The largest difference of a logit.
        deviation: Standard deviation of the reference's logits.
        agreement: Share of the positions where both find the same token likeliest.
        kl: Mean over the positions of the Kullback-Leibler divergence of its next-token distribution from the
            reference's, in nats.
        positions: How many were compared.
    """

    largest: float
    deviation: float
    agreement: float
    kl: float
    positions: int

    @property
    def keeps(self) -> bool:
        """Whether it is near enough to be taken for the trained model."""
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
    """Base and adapters as peft computes them, on some prompts.

    Args:
        source: What is merged, on the published base.
        plans: What will be written.
        adapted: Base and adapters.
        prompts: The rows.
    """

    def __init__(self, source: MergeSource, plans: Sequence[TensorPlan], adapted: Adapted, prompts: Prompts) -> None:
        self._source, self._adapted, self._prompts = source, adapted, prompts
        self._plans = {plan.name: plan for plan in plans}
        self._known: dict[int, Tensor] = {}

    def on(self, base: PublishedBase | QuantizedBase) -> Tensor:
        """Logits (P, V) of the adapters on a base, computed once."""
        if id(base) not in self._known:
            rows = replace(self._source, base=base).rows
            logits = self._adapted.logits(rows, self._prompts.ids, self._source.device)
            self._known[id(base)] = logits[self._prompts.counted]
        return self._known[id(base)]

    def compare_bases(self, trained: QuantizedBase) -> Comparison:
        """How far the adapters on the published base are from those on the base that they were trained on."""
        found = compare(self.on(trained), self.on(self._source.base))
        logger.info('compared with the adapter on the base that it was trained on (%d bit), on %s, %d positions:',
                    trained.bits, self._prompts.source, found.positions)  # fmt: skip
        logger.info('  --base original: %s', found)
        return found

    def compare_merged(self, trained: QuantizedBase) -> Comparison:
        """How far a merge on the base that the adapters were trained on would be from them, before it is written."""
        source = replace(self._source, base=trained, written=[], unchanged=[])

        def open_merged(name: str) -> Rows:
            whole = torch.cat(list(source.merged(self._plans[name])))
            return lambda start, stop: whole[start:stop]

        found = compare(self.on(trained), self._run(self._source.reader.folder, self._adapted.changes, open_merged))
        logger.info('  --base dequantized: %s', found)
        return found

    def check(self, folder: Path, merged_on: PublishedBase | QuantizedBase, dtype: torch.dtype) -> Tensor:
        """Compares what was written with the adapters on the base that it was merged on; returns its logits.

        Raises:
            ModelError: they differ by more than rounding explains.
        """
        written = self._run(folder, {}, _rows_of(open_weights(folder)))
        found = compare(self.on(merged_on), written)
        limit = TOLERANCE[dtype] * found.deviation
        logger.info(
            'verified on %s, %d positions: largest logit difference %.2g (logits spread %.2g, allowed %.2g), '
            'same likeliest token at %.1f %%', self._prompts.source, found.positions, found.largest, found.deviation,
            limit, 100 * found.agreement,
        )  # fmt: skip
        if not found.largest <= limit:
            raise ModelError(
                f'the merged model differs from base and adapter: a logit by {found.largest:.3g}, where rounding '
                f'explains {limit:.3g}; same likeliest token at {100 * found.agreement:.1f} % of {found.positions} '
                'positions. Nothing was left; --verify 0 writes it all the same'
            )
        return written

    def _run(self, folder: Path, changes: Mapping[str, Any], rows: Opener) -> Tensor:
        model = Layerwise(skeleton(folder, changes), self._source.device)
        return model.logits(rows, self._prompts.ids)[self._prompts.counted]


def _rows_of(reader: WeightReader) -> Opener:
    return lambda name: lambda start, stop: reader.rows(name, start, stop)
