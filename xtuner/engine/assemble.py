"""Puts a run together from its parts: strategy, runner, hooks, and the space that its checkpoints will take."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtuner.config.schema import TrainConfig
from xtuner.dataset.conversation import Message
from xtuner.dataset.first_prompts import first_prompts
from xtuner.dataset.templates.template import Template
from xtuner.engine.batches import MicroBatches
from xtuner.engine.build import RunInputs
from xtuner.engine.checkpoint.disk_space import check_space, checkpoint_bytes
from xtuner.engine.checkpoint.store import list_checkpoints
from xtuner.engine.distributed import Strategy, make_strategy
from xtuner.engine.distributed.launch import RankInfo, sequence_group
from xtuner.engine.hooks import CheckpointHook, DatasetInfoHook, EvaluateChatHook, LogHook, ValidateHook
from xtuner.engine.preflight import memory_advice
from xtuner.engine.runner import Runner
from xtuner.engine.schedule import TrainingSchedule
from xtuner.engine.signals import StopRequest
from xtuner.errors import XTunerError
from xtuner.fused.enable import sync_once_per_step
from xtuner.model.sharded_loading import num_parameters
from xtuner.objectives.model import TrainingModel
from xtuner.registry import build
from xtuner.utils.units import counted

logger = logging.getLogger('xtuner')


def assemble_strategy(
    config: TrainConfig, model: TrainingModel, plan: TrainingSchedule, name: str, group: RankInfo
) -> Strategy:
    """Hands model and optimizer to the strategy, and says once how many steps of what size will come."""

    def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of the config, over what a strategy hands out."""
        optimizer = build(config.optimizer, 'optimizer', parameters)
        if config.runtime.fast:
            sync_once_per_step(optimizer)
        return optimizer

    if config.parallel.sequence_parallel_size > 1:
        model.share_sequences(sequence_group(config.parallel.sequence_parallel_size))
    strategy = make_strategy(config, name, group.rank, group.world_size).prepare(model, make_optimizer)
    if group.watch is not None:
        strategy.on_reduce(group.watch.on_bucket)
    schedule, size = config.schedule, config.parallel.sequence_parallel_size
    logger.info(
        'plan: %s, %s, warm-up %d; %s (%s%s); a step is %d x %d x %d = %d items (batch x '
        'accumulated x %s)%s, up to %s tokens',
        counted(plan.num_items, 'item'),
        counted(plan.num_steps, 'step'),
        plan.num_warmup_steps,
        counted(group.world_size, 'device'),
        strategy.name,
        f', {size} a pack' if size > 1 else '',
        schedule.batch_size,
        schedule.accumulative_counts,
        plan.world_size,
        plan.items_per_step,
        'groups of devices' if size > 1 else 'devices',
        f', the last of {plan.items_of_last_step}' if plan.items_of_last_step < plan.items_per_step else '',
        f'{plan.largest_step * config.dataset.max_length:,}',
    )
    return strategy


def assemble_runner(
    config: TrainConfig,
    data: RunInputs,
    strategy: Strategy,
    plan: TrainingSchedule,
    dtype: torch.dtype,
    stop: StopRequest,
    write: Callable[[Path, dict[str, torch.Tensor] | None], None],
    work_dir: Path,
    launcher: str,
    group: RankInfo,
) -> Runner:
    """The runner with its batches, hooks and loop; `write` writes a checkpoint's model files."""
    runtime = config.runtime
    rank = group.rank // config.parallel.sequence_parallel_size  # ranks that share packs read the same ones
    collate = strategy.bare.objective.collate
    batches = MicroBatches(data.dataset, config, plan, pad_id=data.pad_id, rank=rank, collate=collate)
    runner = Runner(
        strategy,
        batches,
        watch=group.watch,
        hooks=_hooks(config, data, collate),
        work_dir=work_dir,
        seed=runtime.seed,
        trackers=config.log.trackers,
        launcher=launcher,
        write_model=write,
    )
    runner.set_loop(
        plan=plan,
        compute_dtype=dtype,
        seed=runtime.seed,
        max_nonfinite_steps=runtime.max_nonfinite_steps,
        stop=stop,
        origins=batches.origins,
        memory_advice=partial(memory_advice, config, data, group.world_size),
    )
    return runner


def _sample_prompts(config: TrainConfig, template: Template) -> Sequence[str | Sequence[Message]]:
    """The config's prompts, or the first of the data. Those stay out of the config, which checkpoints carry."""
    if config.samples.prompts is not None:
        return config.samples.prompts
    try:
        prompts = first_prompts(config.dataset, template)
        if prompts:
            logger.info('samples: the first prompts of the data, every %d steps; they stay in the work folder, and '
                        '`samples.prompts=[]` turns them off', config.samples.interval)  # fmt: skip
        return prompts
    except XTunerError as error:  # samples are not worth a run
        logger.warning('no samples: the first prompts of the data cannot be read: %s', error)
        return []


def _hooks(config: TrainConfig, data: RunInputs, collate: Callable[..., dict[str, torch.Tensor]]) -> list[Any]:
    samples, interval = config.samples, config.checkpoint.interval
    validation = []
    if data.validation is not None:
        validation = [
            ValidateHook(
                data.validation,
                pad_id=data.pad_id,
                batch_size=config.schedule.batch_size,
                interval=interval,
                collate=collate,
            )
        ]
    return [
        DatasetInfoHook(data.dataset, data.tokenizer),
        EvaluateChatHook(
            data.tokenizer,
            data.template,
            _sample_prompts(config, data.template),
            system=samples.system,
            every_n_iters=samples.interval,
            max_new_tokens=samples.max_new_tokens,
        ),
        LogHook(config.log.interval),
        *validation,
        CheckpointHook(interval, config.checkpoint.max_keep, keep_best=config.checkpoint.keep_best),
        *[build(hook, f'hooks[{i}]') for i, hook in enumerate(config.hooks)],
    ]


def check_checkpoint_space(
    work_dir: Path, config: TrainConfig, plan: TrainingSchedule, model: TrainingModel, data: RunInputs
) -> None:
    """Checks the disk space for all checkpoints that exist at a time: one more than are kept, while it is saved."""
    num_saves = math.ceil(plan.num_steps / config.checkpoint.interval)
    kept = config.checkpoint.max_keep + (data.validation is not None and config.checkpoint.keep_best)
    most = num_saves if config.checkpoint.max_keep < 1 else min(num_saves, kept + 1)
    missing = most - len(list_checkpoints(work_dir))
    if missing > 0:
        trained = torch.empty(num_parameters(model, trained=True), device='meta')  # all in float32
        size = checkpoint_bytes([trained])
        check_space(work_dir, missing * size, '1 checkpoint would' if missing == 1 else f'{missing} checkpoints')
