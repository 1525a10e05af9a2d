"""The training loop: one iteration is one optimizer step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.runner import BaseLoop
from torch import Tensor

from xtuner.dataset.collate import count_targets
from xtuner.engine.plan import Plan
from xtuner.errors import TrainingError


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did, over all ranks. Hooks get it as the dict `outputs`.

    Attributes:
        loss: Mean negative log-likelihood, in nats a target token.
        grad_norm: L2 norm of the gradient before clipping.
        lr: Learning rate of the first parameter group.
        num_targets: Target tokens.
        num_tokens: Tokens computed, padding included.
        seconds: Wall time, data loading included.
        skipped: The gradient was not finite, so no weight was changed.
    """

    loss: float
    grad_norm: float
    lr: float
    num_targets: int
    num_tokens: int
    seconds: float
    skipped: bool


class TrainLoop(BaseLoop):
    """Accumulates micro-batches, normalises by the step's target tokens, clips, steps.

    The gradient of a step is that of `sum of losses / number of targets`, both over all its micro-batches and ranks,
    so it does not depend on how the same samples are split into micro-batches.

    Args:
        runner: The mmengine runner; gives model, optimizer and hooks.
        dataloader: Yields micro-batches from `step` on, in the plan's order.
        plan: Steps and learning rates.
        compute_dtype: float32 computes as is; bfloat16 and float16 autocast; float16 also scales the loss.
        seed: Each step seeds torch's generators anew from this, the step and the rank. So dropout needs no saved state,
            and nothing that draws between two steps (a sample generation, a user's hook) can change the run.
        max_nonfinite_steps: The run ends after so many steps in a row without a finite gradient.
    """

    def __init__(
        self,
        runner: Any,
        dataloader: Iterable[dict[str, Tensor]],
        *,
        plan: Plan,
        compute_dtype: torch.dtype,
        seed: int,
        max_nonfinite_steps: int,
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
        self._nonfinite_in_a_row = 0
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
        return self.step * self.plan.items_per_step // self.plan.num_items

    @property
    def max_epochs(self) -> int:
        """Passes over the data that the run will begin."""
        return math.ceil(self.plan.num_micro_batches * self.plan.items_per_micro_batch / self.plan.num_items)

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
        self._note('reading its data')
        micro_batches = [next(batches) for _ in range(self.plan.micro_batches_of(self.step))]
        self.runner.call_hook('before_train_iter', batch_idx=self.step, data_batch=micro_batches)
        result = self._optimize(micro_batches, start)
        if self._watch is not None:
            self._watch.pause()  # hooks may write and generate as long as they like
        self.runner.call_hook('after_train_iter', batch_idx=self.step, data_batch=micro_batches, outputs=asdict(result))
        self.step += 1
        self._stop_if_diverged(result)

    def _optimize(self, micro_batches: list[dict[str, Tensor]], start: float) -> StepResult:
        torch.manual_seed((self._seed << 40) + self.step * self.strategy.world_size + self.strategy.rank)
        optimizer = self.runner.optim_wrapper.optimizer
        factor = self.plan.lr_factor(self.step)
        for group, base in zip(optimizer.param_groups, self._base_lrs, strict=True):
            group['lr'] = base * factor
        counts = torch.tensor([[count_targets(b['labels']), b['labels'].numel()] for b in micro_batches]).sum(0)
        self._note('waiting for the others')
        num_targets, num_tokens = self._over_ranks(counts).tolist()
        self._note('computing')
        if num_targets == 0:
            raise TrainingError(
                f'step {self.step + 1} has no target token; see `xtuner log-dataset` for what is trained'
            )
        loss = self._backward(micro_batches, num_targets)
        grad_norm, skipped = self.strategy.update(self.scaler, self.plan.schedule.max_norm, loss)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            lr=optimizer.param_groups[0]['lr'],
            num_targets=num_targets,
            num_tokens=num_tokens,
            seconds=time.perf_counter() - start,
            skipped=skipped,
        )

    def _backward(self, micro_batches: list[dict[str, Tensor]], num_targets: int) -> float:
        """Adds up the gradients of all micro-batches; returns the step's mean loss over all ranks."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            on_device = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            with self.strategy.synchronised(number == len(micro_batches)):
                with self.autocast():
                    loss_sum = self.runner.model(**on_device)
                # The sum over all ranks is wanted, whatever the strategy does to gradients.
                self.strategy.backward(self.scaler.scale(loss_sum * (self.strategy.gradient_factor / num_targets)))
            total += loss_sum.detach()
        return self._over_ranks(total).item() / num_targets

    def _note(self, what: str) -> None:
        """Tells the other ranks where this one is, so that they can name it should it hang."""
        if self._watch is not None:
            self._watch.note(f'step {self.step + 1}, {what}')

    def _over_ranks(self, value: Tensor) -> Tensor:
        if self.strategy.world_size > 1:
            value = value.to(self.device)
            all_reduce(value)
        return value

    def _stop_if_diverged(self, result: StepResult) -> None:
        self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if result.skipped else 0
        if self._nonfinite_in_a_row >= self._max_nonfinite_steps:
            raise TrainingError(
                f'{self._nonfinite_in_a_row} steps in a row had no finite gradient (last: step {self.step}, loss '
                f'{result.loss}); lower optimizer.lr, or use model.dtype bf16; the last checkpoint is kept'
            )
