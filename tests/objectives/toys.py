"""Objectives that the tests write on target rows, and the same losses from all logits, by their definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.objectives.base import Metrics, Objective, Statistics, TargetRows

SMOOTHING, BETA = 0.3, 0.5


class Rewritten(Objective):
    """Supervised fine-tuning from the log-probabilities."""

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics]:
        return -rows.log_prob.sum(), {'correct': (rows.log_prob > -0.7).sum()}


class Smoothed(Objective):
    """Label smoothing; the entropy is only logged."""

    needs = ('log_prob', 'sum_log_probs', 'entropy')
    no_grad = ('entropy',)

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics]:
        loss = -(1 - SMOOTHING) * rows.log_prob - SMOOTHING / rows.vocabulary * rows.sum_log_probs
        return loss.sum(), {'entropy': rows.entropy.sum()}


class Anchored(Objective):
    """Cross entropy, a bonus for entropy, a penalty on log Z and on the divergence from the base."""

    needs = ('log_prob', 'entropy', 'log_sum_exp', 'kl_to_base')

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics]:
        penalty = 0.1 * rows.log_sum_exp.square() - 0.2 * rows.entropy + 0.3 * rows.kl_to_base
        return (penalty - rows.log_prob).sum(), {}


class Preference(Objective):
    """DPO's loss over samples 2 i (chosen) and 2 i + 1 (rejected); the weight is the number of pairs."""

    needs = ('log_prob', 'base_log_prob', 'samples')

    def weight(self, batch: Any) -> float:
        return (batch['labels'] != -100).any(1).sum()  # a row is a pair

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics]:
        margins = rows.sum_by_sample(rows.log_prob - rows.base_log_prob)
        differences = BETA * (margins[0::2] - margins[1::2])
        return -functional.logsigmoid(differences).sum(), {'accuracy': (differences > 0).sum()}


class Standardised(Objective):
    """Each target weighed by how far its log-probability is from the mean of the step, in standard deviations."""

    def statistics(self, rows: TargetRows) -> Statistics:
        moments = torch.stack([rows.log_prob, rows.log_prob.square()], 1).double()
        return {'count': torch.tensor(float(rows.count), device=moments.device), 'moments': moments.sum(0)}

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics]:
        assert statistics is not None
        mean, square = statistics['moments'] / statistics['count']
        far = (rows.log_prob.detach() - mean) / (square - mean**2).sqrt()
        return -(far.float() * rows.log_prob).sum(), {'far': far.abs().sum()}


@dataclass(frozen=True)
class Sample:
    """Logits of the tokens that predict a sample's targets, the base's, and the targets."""

    logits: Tensor
    base: Tensor
    targets: Tensor

    @property
    def log_prob(self) -> Tensor:
        return -functional.cross_entropy(self.logits, self.targets, reduction='none')

    @property
    def base_log_prob(self) -> Tensor:
        return -functional.cross_entropy(self.base, self.targets, reduction='none')


def _smoothed(one: Sample) -> Tensor:
    return functional.cross_entropy(one.logits, one.targets, reduction='sum', label_smoothing=SMOOTHING)


def _anchored(one: Sample) -> Tensor:
    p, q = one.logits.softmax(-1), one.base.softmax(-1)
    divergence = functional.kl_div(q.log(), p.log(), reduction='sum', log_target=True)
    entropy = torch.distributions.Categorical(logits=one.logits).entropy().sum()
    return 0.1 * one.logits.exp().sum(-1).log().square().sum() - 0.2 * entropy + 0.3 * divergence - one.log_prob.sum()


def _preference(samples: list[Sample]) -> Tensor:
    margins = [(one.log_prob - one.base_log_prob).sum() for one in samples]
    pairs = zip(margins[0::2], margins[1::2], strict=True)
    return -sum((BETA * (chosen - rejected)).sigmoid().log() for chosen, rejected in pairs)  # type: ignore[return-value]


def _standardised(samples: list[Sample]) -> Tensor:
    values = torch.cat([one.log_prob for one in samples])
    fixed = values.detach()
    return -((fixed - fixed.mean()) / fixed.std(unbiased=False) * values).sum()


PLAIN: dict[type[Objective], Callable[[list[Sample]], Tensor]] = {
    Rewritten: lambda samples: sum(-one.log_prob.sum() for one in samples),  # type: ignore[dict-item, return-value]
    Smoothed: lambda samples: sum(map(_smoothed, samples)),  # type: ignore[dict-item, return-value, arg-type]
    Anchored: lambda samples: sum(map(_anchored, samples)),  # type: ignore[dict-item, return-value, arg-type]
    Preference: _preference,
    Standardised: _standardised,
}
"""The same losses, summed over samples."""
