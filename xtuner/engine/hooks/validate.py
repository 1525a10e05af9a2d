"""The objective's loss on conversations that are not trained."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX
from xtuner.dataset.packing.collate import collate
from xtuner.engine.step.statistics import sum_statistics
from xtuner.objectives.base import weight_of
from xtuner.tracking.files import METRICS_FILE
from xtuner.utils.jsonl import append_line
from xtuner.utils.progress import Progress

logger = logging.getLogger('xtuner')


class ValidateHook(Hook):
    """Computes the objective's mean loss over a validation set, each so many steps and at the end.

    The sum over the set is divided once by its weight, so the figure does not depend on batches or ranks. An objective
    with statistics gets those of the validation set, which takes another pass over it.

    Args:
        dataset: Prepared validation items.
        pad_id: Fills rows up.
        batch_size: Items a forward pass.
        interval: Optimizer steps between two validations.
        collate: Joins items into a batch; see `Objective.collate`.
    """

    priority = 'LOW'

    def __init__(
        self,
        dataset: Any,
        *,
        pad_id: int,
        batch_size: int,
        interval: int,
        collate: Callable[..., dict[str, torch.Tensor]] = collate,
    ) -> None:
        self._dataset, self._pad_id, self._batch_size, self._interval = dataset, pad_id, batch_size, interval
        self._collate = collate

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Validates when it is time."""
        step = runner.iter + 1
        if step % self._interval == 0 or step == runner.max_iters:
            loss = self.evaluate(runner.bare_model, runner.train_loop)
            runner.train_loop.validation_loss = loss
            if runner.rank == 0:
                logger.info('step %d · validation loss %.4f', step, loss)
                append_line(Path(runner.work_dir) / METRICS_FILE, {'step': step, 'val_loss': loss})
                runner.visualizer.add_scalars({'eval/loss': loss}, step=step)

    @torch.no_grad()
    def evaluate(self, model: Any, loop: Any) -> float:
        """The objective's loss over all ranks, divided by its weight: for SFT nats a target token."""
        was_training = model.training
        model.eval()
        ranks = (loop.strategy.rank, loop.strategy.world_size, loop.plan.world_size)
        statistics = sum_statistics(model, self._batches(*ranks), autocast=loop.autocast, over_ranks=_over_ranks)
        extra = {} if statistics is None else {'statistics': statistics}
        sums = torch.zeros(2, dtype=torch.float64, device=loop.device)
        for batch, counted in self._batches(*ranks):
            with loop.autocast():
                loss_sum = model(**batch, **extra)
            if not counted:
                continue
            weight = torch.tensor(weight_of(model.objective, batch), dtype=torch.float64)
            sums += torch.stack([loss_sum.double(), weight.to(loss_sum.device)])
        # Ranks that share packs have each a part of the loss and all of the weight.
        sums[1] /= loop.strategy.world_size // loop.plan.world_size
        model.train(was_training)
        all_reduce(sums)
        return (sums[0] / sums[1]).item()

    def _batches(self, rank: int, world_size: int, num_groups: int) -> Iterator[tuple[dict[str, torch.Tensor], bool]]:
        """This rank's batches, and whether each counts.

        There are as many on every rank: where weights are put together for a batch, all take part.
        """
        mine = range(rank // (world_size // num_groups), len(self._dataset), num_groups)
        starts = range(0, math.ceil(len(self._dataset) / num_groups), self._batch_size)
        for start in Progress(starts, 'validating', unit='batches'):
            chosen = mine[start : start + self._batch_size]
            batch = self._collate([self._dataset[i] for i in chosen or (0,)], pad_id=self._pad_id)
            if not chosen:
                batch['labels'].fill_(IGNORE_INDEX)  # nothing is left for this rank: it computes as little as it can
            yield batch, bool(chosen)


def _over_ranks(value: torch.Tensor) -> torch.Tensor:
    all_reduce(value)
    return value
