"""Selects and validates the distributed strategy of a run."""

from __future__ import annotations

from xtuner.config import compatibility
from xtuner.config.deepspeed import stage_of
from xtuner.config.schema import TrainConfig
from xtuner.engine.distributed.base import Single, Strategy
from xtuner.errors import ConfigError
from xtuner.objectives.base import Objective, needs_base


def choose_strategy(
    config: TrainConfig, world_size: int, *, dtype: str | None = None, objective: Objective | None = None
) -> str:
    """Returns the strategy's name; 'auto' becomes `single` for one process and `ddp` for several.

    Args:
        config: A run's config.
        world_size: Number of processes.
        dtype: 'bf16', 'fp16' or 'fp32' if `model.dtype` is auto and already resolved.
        objective: The training objective, if already loaded.

    Raises:
        ConfigError: Unknown strategy, an unsupported combination (see `config.compatibility`), or numbers that do not
            divide.
    """
    name, size = config.parallel.strategy, config.parallel.sequence_parallel_size
    if name == 'auto':
        name = 'single' if world_size == 1 else 'ddp'
    if name == 'single' and world_size > 1:
        raise ConfigError(f'`parallel.strategy` is single, but {world_size} processes were started; use ddp or fsdp')
    with_base = objective is not None and needs_base(objective)
    by_sample = objective is not None and 'samples' in objective.needs
    compatibility.check(
        compatibility.combination_of(config, stage_of(name), dtype=dtype, with_base=with_base, by_sample=by_sample)
    )
    if world_size % size:
        raise ConfigError(
            f'`parallel.sequence_parallel_size` is {size}, which does not divide the {world_size} processes; start a '
            'multiple of it'
        )
    return name


def make_strategy(config: TrainConfig, name: str, rank: int, world_size: int) -> Strategy:
    """Creates the strategy of that name, importing only what it needs."""
    if name == 'single':
        return Single(rank, world_size)
    if name == 'ddp':
        from xtuner.engine.distributed.ddp import DataParallel

        return DataParallel(rank, world_size)
    if name == 'fsdp':
        from xtuner.engine.distributed.fsdp import FullyShard

        return FullyShard(rank, world_size)
    from xtuner.engine.distributed.deepspeed import ZeRO

    return ZeRO(config, name, rank, world_size)
