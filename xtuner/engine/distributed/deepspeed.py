"""DeepSpeed's ZeRO: optimizer state (1), gradients (2) and weights (3) sharded over the ranks. An optional extra.

Trained parameters stay float32 and the forward pass runs under autocast, as in all strategies; so DeepSpeed's own half
precision is off. Its checkpoints are not used either: full tensors are gathered instead.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.adapters.attach import trainable_parameters
from xtuner.config.deepspeed import read_deepspeed_config
from xtuner.config.schema import TrainConfig
from xtuner.engine.distributed.base import MakeOptimizer, Strategy, leaves
from xtuner.errors import ConfigError


class ZeRO(Strategy):
    """DeepSpeed's engine around the model and the config's optimizer.

    Args:
        config: The run's config.
        strategy: Name or file of the DeepSpeed config.
        rank: Rank of this process.
        world_size: Number of processes.
    """

    has_gradients = False

    def __init__(self, config: TrainConfig, strategy: str, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        if importlib.util.find_spec('deepspeed') is None:
            raise ConfigError(
                f"strategy {strategy} needs DeepSpeed, which is not installed: pip install 'xtuner[deepspeed]', or use "
                'fsdp'
            )
        self.name = strategy
        self.gradient_factor = float(world_size)  # DeepSpeed averages gradients
        self._settings = read_deepspeed_config(strategy) | {
            'train_micro_batch_size_per_gpu': config.schedule.batch_size,
            'gradient_accumulation_steps': 1,  # the loop determines which micro-batch is a step's last
            'gradient_clipping': config.schedule.max_norm or 0.0,
        }
        self.together = self._shards_weights = self._settings['zero_optimization']['stage'] == 3

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Strategy:
        """Wraps model and optimizer in DeepSpeed's engine."""
        import deepspeed

        logging.getLogger('DeepSpeed').setLevel(logging.WARNING)
        self.bare = model
        for parameter in model.parameters():
            if not parameter.requires_grad and not self._shards_weights:
                parameter.ds_optim_param = True  # type: ignore[attr-defined]  # excludes it from the initial broadcast
        optimizer = make_optimizer(trainable_parameters(model).values())
        engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._settings, dist_init_required=False
        )
        self.module = engine
        self.optimizer.check_grad_overflow = True  # a step with a non-finite gradient changes nothing
        self._inner = optimizer
        return self

    def synchronised(self, last: bool) -> Any:
        """Tells the engine whether this micro-batch is the last of its step."""
        self.module.set_gradient_accumulation_boundary(last)
        return super().synchronised(last)

    def backward(self, loss: Tensor) -> None:
        """Runs the engine's backward pass."""
        self.module.backward(loss)

    def clip(self, scaler: torch.amp.GradScaler, max_norm: float) -> float:
        """Clips and also steps: the engine does both at once, and changes nothing if a gradient is not finite."""
        self.module.step()
        if getattr(self.optimizer, 'overflow', False):
            return math.inf
        return float(self.module.get_global_grad_norm() or 0.0)

    def step(self, scaler: torch.amp.GradScaler, *, skipped: bool) -> None:
        """Does nothing: `clip` already stepped."""

    def forget(self) -> None:
        """Drops the engine's gradients."""
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor] | None:
        """Gathers sharded trained tensors one by one and keeps them on rank 0 only."""
        if not self._shards_weights:
            return None
        import deepspeed

        tensors = {}
        for name, parameter in trainable_parameters(self.bare).items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.rank == 0:
                    tensors[name.removeprefix('llm.')] = parameter.detach().cpu().clone()
        return tensors

    def optimizer_state(self) -> dict[str, Any]:
        """Gathers full tensors from the partitions with DeepSpeed's own functions."""
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters = list(trainable_parameters(self.bare).values())
        partition, form = next(iter(self._inner.state.items()), (None, {}))  # SGD without momentum has none
        state = {
            number: {
                name: safe_get_full_optimizer_state(parameter, name).cpu() if _is_of(value, partition) else value
                for name, value in form.items()
            }
            for number, parameter in enumerate(parameters if form else ())
        }
        groups = [group | {'params': list(range(len(parameters)))} for group in self._inner.param_groups]
        return {'state': state, 'param_groups': groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads the state into the partitions."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not state['state']:
            return
        parameters = list(trainable_parameters(self.bare).values())
        shapes = [_shape(parameter) for parameter in parameters]
        self._allocate_state(leaves(state['state'][0]), shapes[0])
        for number, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
            for path, value in leaves(state['state'][number]).items():
                if not isinstance(value, Tensor) or value.shape != shape:
                    continue
                if self._shards_weights:
                    safe_set_local_optimizer_state(parameter, _partition_of(parameter, value, self.rank), path[-1])
                else:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), path[-1])

    def _allocate_state(self, saved: dict[tuple[str, ...], Any], shape: torch.Size) -> None:
        """Allocates the state of each partition as the optimizer's first step would, with scalars as saved."""
        # Stage 3 passes its partitions to the optimizer one by one, within a step.
        partitions = self.optimizer.fp32_partitioned_groups_flat if self._shards_weights else [
            partition for group in self._inner.param_groups for partition in group['params']
        ]  # fmt: skip
        for partition in partitions:
            for path, value in saved.items():
                of_elements = isinstance(value, Tensor) and value.shape == shape
                self._inner.state[partition][path[-1]] = torch.zeros_like(partition) if of_elements else value
        if not self._shards_weights:
            self.optimizer._lazy_init_hp_params_optimizer_state()


def _shape(parameter: Any) -> torch.Size:
    """A parameter's full shape, also while it is partitioned."""
    return getattr(parameter, 'ds_shape', parameter.shape)


def _partition_of(parameter: Any, whole: Tensor, rank: int) -> Tensor:
    """Stage 3's partition of a tensor on this rank: an equal share of its elements, zero-padded."""
    size = parameter.ds_tensor.numel()
    partition = torch.zeros(size, dtype=whole.dtype, device=parameter.ds_tensor.device)
    elements = whole.flatten()[rank * size : (rank + 1) * size]
    partition[: elements.numel()] = elements.to(partition.device)
    return partition


def _is_of(value: Any, partition: Any) -> bool:
    """Whether a value of a partition's state has one element for each of the partition's."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.numel() == partition.numel()
