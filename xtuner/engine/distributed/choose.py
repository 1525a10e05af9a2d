"""Which strategy a run takes, and whether it may."""

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
    """The strategy's name: what the config says, where 'auto' is `single` for one process and `ddp` for several.

    Args:
        config: A run.
        world_size: Its processes.
        dtype: 'bf16', 'fp16' or 'fp32', where `model.dtype` is auto and it is known already.
        objective: What is trained for, where it is known already.

    Raises:
        ConfigError: no such strategy, a combination that cannot be (see `config.compatibility`), or numbers that do
            not divide.
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
    """The strategy of that name. Imports only what it needs."""
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
