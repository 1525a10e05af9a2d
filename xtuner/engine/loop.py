"""The training loop: one iteration is one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from mmengine.dist import all_reduce
from mmengine.runner import BaseLoop
from torch import Tensor

from xtuner.dataset.packing.collate import count_targets
from xtuner.engine.schedule import TrainingSchedule
from xtuner.engine.signals import STOP_SIGNALS, StepStopped, StopRequest
from xtuner.engine.step.checks import (
    check_gradients,
    check_targets,
    dead_worker_message,
    is_dead_worker,
    next_batch,
)
from xtuner.engine.step.result import Origins, Skips, StepOrigins, StepResult
from xtuner.engine.step.statistics import MetricMeans, sum_statistics
from xtuner.errors import Interrupted, TrainingError
from xtuner.memory.oom import memory_message
from xtuner.objectives.base import weight_of
from xtuner.utils.out_of_memory import is_out_of_memory


class TrainLoop(BaseLoop):
    """Accumulates micro-batches, normalises by the step's weight, clips, steps.

    The gradient of a step is that of `sum of losses / sum of weights`, both over all its micro-batches and ranks, so it
    does not depend on how the same samples are split into micro-batches. What is summed and weighed the objective says
    (`objectives.base`): for supervised fine-tuning the negative log-likelihood, and target tokens.

    A signal to stop is followed before the next micro-batch, on all ranks before the same one: the step is given up, so
    that weights and optimizer are those after the last whole step, from which a resumed run does it again.

    Args:
        runner: The mmengine runner; gives model, optimizer and hooks.
        dataloader: Yields micro-batches from `step` on, in the plan's order.
        plan: Steps and learning rates.
        compute_dtype: float32 computes as is; bfloat16 and float16 autocast; float16 also scales the loss.
        seed: Each step seeds torch's generators anew from this, the step and the rank. So dropout needs no saved state,
            and nothing that draws between two steps (a sample generation, a user's hook) can change the run.
        max_nonfinite_steps: The run ends after so many steps in a row without a finite gradient.
        stop: Whether a signal asks to stop; None: nothing ever does.
        origins: Names the items of a micro-batch for messages; None leaves that out.
        memory_advice: Gives settings that would need less memory, called when it has run out.

    Attributes:
        step: Optimizer steps done.
        validation_loss: Of the step under way, once it was validated; None before.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Iterable[dict[str, Tensor]],
        *,
        plan: TrainingSchedule,
        compute_dtype: torch.dtype,
        seed: int,
        max_nonfinite_steps: int,
        stop: StopRequest | None = None,
        origins: Origins | None = None,
        memory_advice: Callable[[], Sequence[str]] = list,
    ) -> None:
        super().__init__(runner, dataloader)
        self.plan = plan
        self.step = 0
        self.strategy = runner.strategy
        self._watch = runner.watch
        self.device = next(runner.model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=compute_dtype == torch.float16)
        self._compute_dtype = compute_dtype
        self._seed = seed
        self._max_nonfinite_steps = max_nonfinite_steps
        self.skips = Skips()
        self.validation_loss: float | None = None
        self._stop = stop or StopRequest()
        self._stop_agreed: int | None = None
        self._origins, self._memory_advice = StepOrigins(origins), memory_advice
        self._gradients_checked = False
        self._metrics = MetricMeans(self.strategy, self._over_ranks)
        self._base_lrs = [group['lr'] for group in runner.optim_wrapper.optimizer.param_groups]

    # What mmengine's runner and hooks ask a loop for.
    @property
    def iter(self) -> int:
        """Optimizer steps done."""
        return self.step

    @property
    def max_iters(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan.num_steps

    @property
    def epoch(self) -> int:
        """Whole passes over the data done."""
        return int(self.plan.epochs_after(self.step))

    @property
    def max_epochs(self) -> int:
        """Passes over the data that the run will begin."""
        return math.ceil(self.plan.num_micro_batches * self.plan.items_per_micro_batch / self.plan.num_items)

    @property
    def stop_signal(self) -> int | None:
        """The signal for which the run ends after the step under way, on all ranks alike; None: it goes on."""
        return self._stop_agreed if self.strategy.world_size > 1 else self._stop.signal_number

    def autocast(self) -> torch.autocast:
        """The context that the model's forward pass runs in."""
        return torch.autocast(self.device.type, self._compute_dtype, enabled=self._compute_dtype != torch.float32)

    def run(self) -> torch.nn.Module:
        """Trains from `step` to the end of the plan and returns the model."""
        runner = self.runner
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        runner.model.train()
        batches = iter(self.dataloader)
        while self.step < self.max_iters:
            self.run_iter(batches)
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def run_iter(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """One optimizer step, with the hooks around it."""
        start = time.perf_counter()
        self.validation_loss = None
        self._note('reading its data')
        micro_batches: list[dict[str, Tensor]] = []
        try:
            micro_batches += [next_batch(batches) for _ in range(self.plan.micro_batches_of(self.step))]
            self.runner.call_hook('before_train_iter', batch_idx=self.step, data_batch=micro_batches)
            result = self._optimize(micro_batches, start)
            if self._watch is not None:
                self._watch.suspend()  # hooks may write and generate as long as they like
            self.runner.call_hook(
                'after_train_iter', batch_idx=self.step, data_batch=micro_batches, outputs=result.outputs()
            )
        except StepStopped as stopped:
            self._give_up(stopped.signal_number)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                where = self._origins.describe(self.step, range(len(micro_batches)))
                reason = memory_message(self.runner, micro_batches, self._memory_advice())
                raise TrainingError(f'step {self.step + 1}: {reason}; the batch: {where}') from error
            if is_dead_worker(error):  # noticed whenever the system tells of it, not only where a batch is awaited
                raise TrainingError(dead_worker_message(error)) from error
            raise
        self.step += 1
        self._stop_if_diverged(result)

    def _optimize(self, micro_batches: list[dict[str, Tensor]], start: float) -> StepResult:
        self._seed_step()
        for number, batch in enumerate(micro_batches):
            check_targets(batch['labels'], self.step, partial(self._origins.rows, self.step, number))
        self._note('waiting for the others')
        weight, num_targets, num_tokens = self._count(micro_batches)
        statistics = self._statistics(micro_batches)
        self._note('computing')
        loss, losses, metrics = self._backward(micro_batches, weight, statistics)
        optimizer = self.runner.optim_wrapper.optimizer
        factor = self.plan.lr_factor(self.step)
        for group, base in zip(optimizer.param_groups, self._base_lrs, strict=True):
            group['lr'] = base * factor
        max_norm = self.plan.schedule.max_norm
        grad_norm = self.strategy.clip(self.scaler, math.inf if max_norm is None else max_norm)
        skipped = not (math.isfinite(grad_norm) and math.isfinite(loss))
        self.skips.note(skipped)
        if skipped:
            self._origins.report_skip(self.step, self.skips, loss, grad_norm, losses)
        elif not self._gradients_checked and self.strategy.has_gradients:
            check_gradients(self.strategy.bare, self.step)
            self._gradients_checked = True
        self.strategy.step(self.scaler, skipped=skipped)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            lr=optimizer.param_groups[0]['lr'],
            num_targets=num_targets,
            num_tokens=num_tokens,
            seconds=time.perf_counter() - start,
            skipped=skipped,
            num_skipped=self.skips.total,
            metrics=metrics,
        )

    def _seed_step(self) -> None:
        """Seeds torch's generators for this step and rank."""
        draw = self.step * self.strategy.world_size + self.strategy.rank
        torch.manual_seed(int(np.random.SeedSequence([self._seed, draw]).generate_state(1, np.uint64)[0]))

    def _count(self, micro_batches: list[dict[str, Tensor]]) -> tuple[float, int, int]:
        """Weight, targets and tokens of the step over all ranks; in the same message, for which signal one is to stop.

        Raises:
            TrainingError: `Objective.weight` failed, or its sum is not a number above 0.
        """
        objective = self.strategy.bare.objective
        weights = [weight_of(objective, batch) for batch in micro_batches]
        sizes = [[count_targets(batch['labels']), batch['labels'].numel()] for batch in micro_batches]
        # Whole numbers are exact below 2**53.
        counts = torch.tensor([[w, *size] for w, size in zip(weights, sizes, strict=True)], dtype=torch.float64).sum(0)
        asked = torch.tensor([self._stop.signal_number == number for number in STOP_SIGNALS], dtype=counts.dtype)
        weight, num_targets, num_tokens, *num_asked = self._over_ranks(torch.cat([counts, asked])).tolist()
        times = self.strategy.world_size // self.plan.world_size  # ranks that share packs count the same ones
        self._stop_agreed = next((s for s, num in zip(STOP_SIGNALS, num_asked, strict=True) if num), None)
        if not 0 < weight < math.inf:
            raise TrainingError(
                f'step {self.step + 1}: objective {objective.name} gave the step the weight {weight}; the '
                'losses are divided by it, so it must be above 0'
            )
        return weight / times, int(num_targets) // times, int(num_tokens) // times

    def _statistics(self, micro_batches: list[dict[str, Tensor]]) -> dict[str, Tensor] | None:
        """What the objective sums over the step before its loss; dropout masks are those of the pass that follows."""
        self._note('collecting statistics')
        counted = ((batch, True) for batch in self._until_stopped(micro_batches))
        found = sum_statistics(self.strategy.bare, counted, autocast=self.autocast, over_ranks=self._over_ranks)
        if found is not None:
            self._seed_step()
        return found

    def _until_stopped(self, micro_batches: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Yields micro-batches; raises StepStopped before one where a signal came to a rank."""
        for number, batch in enumerate(micro_batches):
            if number and (signal_number := self._agreed_stop()):
                raise StepStopped(signal_number)
            yield batch

    def _backward(
        self, micro_batches: list[dict[str, Tensor]], weight: float, statistics: dict[str, Tensor] | None
    ) -> tuple[float, list[Tensor], dict[str, float]]:
        """Adds up the gradients of all micro-batches.

        Returns:
            The step's mean loss over all ranks, this rank's sum of each micro-batch, and the mean of each metric.

        Raises:
            StepStopped: a signal came to one of the ranks.
        """
        losses: list[Tensor] = []
        metrics: list[dict[str, Tensor]] = []
        extra = {} if statistics is None else {'statistics': statistics}
        for number, batch in enumerate(self._until_stopped(micro_batches), 1):
            with self.strategy.synchronised(number == len(micro_batches)):
                with self.autocast():
                    loss_sum = self.runner.model(**batch, **extra)
                # The sum over all ranks is wanted, whatever the strategy does to gradients.
                self.strategy.backward(self.scaler.scale(loss_sum * (self.strategy.gradient_factor / weight)))
            losses.append(loss_sum.detach())
            metrics.append(self.strategy.bare.metrics)
        loss = self._over_ranks(torch.stack(losses).sum()).item() / weight
        return loss, losses, self._metrics.of_step(self.step, metrics, weight)

    def _agreed_stop(self) -> int | None:
        """The signal for which all ranks stop here; None: they go on."""
        if self._watch is not None:
            return self._watch.agree_on_stop(self._stop.signal_number)
        return self._stop.signal_number if self.strategy.world_size == 1 else None

    def _give_up(self, signal_number: int) -> NoReturn:
        """Forgets the step under way, lets hooks save the state before it, and ends the run."""
        if self._watch is not None:
            self._watch.suspend()
        self.strategy.forget()
        self.runner.call_hook('after_stop', signal_number=signal_number)
        raise Interrupted(signal_number, f'stopped in step {self.step + 1}')

    def _note(self, what: str) -> None:
        """Tells the other ranks where this one is, so that they can name it should it hang."""
        if self._watch is not None:
            self._watch.heartbeat(f'step {self.step + 1}, {what}')

    def _over_ranks(self, value: Tensor) -> Tensor:
        if self.strategy.world_size > 1:
            value = value.to(self.device)
            all_reduce(value)
        return value

    def _stop_if_diverged(self, result: StepResult) -> None:
        if self.skips.in_a_row >= self._max_nonfinite_steps:
            raise TrainingError(
                f'{self.skips.in_a_row} steps in a row had no finite gradient (last: step {self.step}, loss '
                f'{result.loss}); lower optimizer.lr, or use model.dtype bf16; the last checkpoint is kept'
            )
