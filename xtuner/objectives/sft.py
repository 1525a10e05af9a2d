"""Supervised fine-tuning: cross entropy averaged over target tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xtuner.objectives.base import Metrics, Objective, Statistics, TargetRows
from xtuner.objectives.head import next_token_loss
from xtuner.objectives.model import TrainingModel

__all__ = ['Sft', 'SupervisedFinetune', 'next_token_loss']


class Sft(Objective):
    """The negative log-likelihood of the targets.

    All targets weigh the same, so the fused cross entropy makes every gradient in its forward pass, that of a trained
    head included: 2 products with a frozen head, 3 with a trained one.
    """

    needs = ('nll_sum',)

    def loss(self, rows: TargetRows, statistics: Statistics | None) -> tuple[Tensor, Metrics]:
        """The sum over the targets."""
        return rows.nll_sum, {}


class SupervisedFinetune(TrainingModel):
    """A model with this objective, by the name that classical configs use."""

    def __init__(self, llm: Any) -> None:
        super().__init__(llm, Sft())
