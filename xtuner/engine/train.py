"""A config to a trained model: what `xtuner train` does, in the order it does it.

What is cheap to check comes first: a wrong argument fails in a second, wrong data before the model is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import set_random_seed
from torch import nn

from xtuner.config.flatten import flatten
from xtuner.config.schema import TrainConfig
from xtuner.engine.batches import MicroBatches, make_plan
from xtuner.engine.checkpoints import LAST_FILE, list_checkpoints, newest_checkpoint, verify_checkpoint
from xtuner.engine.hooks import CheckpointHook, DatasetInfoHook, EvaluateChatHook, LogHook, ValidateHook
from xtuner.engine.launch import Group, process_group
from xtuner.engine.material import Material, load_material, write_model
from xtuner.engine.plan import Plan
from xtuner.engine.runner import Runner
from xtuner.engine.strategies import Strategy, choose_strategy, make_strategy
from xtuner.errors import CheckpointError, ConfigError
from xtuner.model.fast import wait_once_a_step
from xtuner.registry import build, check_arguments

logger = logging.getLogger('xtuner')

# Sentinel for `resume`: the newest whole checkpoint in the work folder.
NEWEST = 'newest'


def train(config: TrainConfig, *, work_dir: Path, resume: str | Path | None = None, launcher: str = 'none') -> Path:
    """Runs a config to its end and returns the last checkpoint's folder.

    Args:
        config: A checked config.
        work_dir: Made where it is missing; must hold no checkpoints unless `resume` is given.
        resume: None starts anew; `NEWEST` or a checkpoint's folder goes on exactly from there.
        launcher: 'none', or who started this process as one of several: 'pytorch' or 'slurm'.

    Raises:
        XTunerError: anything a user can mend, before or during the run.
    """
    _check_open_sections(config)
    checkpoint = _find_checkpoint(work_dir, resume)
    with process_group(launcher, timeout_s=config.parallel.timeout_s) as group:
        _run(config, work_dir, checkpoint, launcher, group)
    last = work_dir / (work_dir / LAST_FILE).read_text(encoding='utf-8').strip()
    logger.info('done: %s', last)
    return last


def _run(config: TrainConfig, work_dir: Path, checkpoint: Path | None, launcher: str, group: Group) -> None:
    name = choose_strategy(config, group.world_size)
    set_random_seed(config.runtime.seed)
    material = load_material(config, checkpoint, group, name)
    _open_work_dir(work_dir, config)  # only now: a run that could not begin leaves nothing behind
    runner = _make_runner(config, material, work_dir, launcher, group, name)
    if checkpoint is not None:
        runner.restore(checkpoint)
        runner.train_loop.dataloader.start_step = runner.iter
        logger.info('resuming from %s at step %d', checkpoint, runner.iter)
    try:
        runner.train()
    finally:
        runner.visualizer.close()


def _check_open_sections(config: TrainConfig) -> None:
    check_arguments(config.optimizer, 'optimizer', given=('params',))
    if config.adapter is not None:
        check_arguments(config.adapter, 'adapter')
    for i, hook in enumerate(config.hooks):
        check_arguments(hook, f'hooks[{i}]')
    for name in config.log.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f"`log.trackers` names {name}, which is not installed; pip install 'xtuner[trackers]', or leave it out"
            )


def _open_work_dir(work_dir: Path, config: TrainConfig) -> None:
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        (work_dir / 'config.py').write_text(flatten(config, title='The config of this run.'), encoding='utf-8')
    except OSError as error:
        raise CheckpointError(f'cannot write to {work_dir}: {error.strerror}; give another --work-dir') from error


def _find_checkpoint(work_dir: Path, resume: str | Path | None) -> Path | None:
    if resume is None:
        if list_checkpoints(work_dir):
            raise CheckpointError(
                f'{work_dir} already holds checkpoints; add --resume to go on with that run, or give another --work-dir'
            )
        return None
    if resume == NEWEST:
        return newest_checkpoint(work_dir, warn=logger.warning)
    verify_checkpoint(Path(resume))
    return Path(resume)


def _make_runner(
    config: TrainConfig, material: Material, work_dir: Path, launcher: str, group: Group, strategy_name: str
) -> Runner:
    runtime = config.runtime
    strategy = make_strategy(config, strategy_name, group.rank, group.world_size)
    size = config.parallel.sequence_parallel_size
    plan = make_plan(material.dataset, config, group.world_size // size)
    batches = MicroBatches(material.dataset, config, plan, pad_id=material.pad_id, rank=group.rank // size)

    def make_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = build(config.optimizer, 'optimizer', parameters)
        if runtime.fast:
            wait_once_a_step(optimizer)
        return optimizer

    strategy.prepare(material.model, make_optimizer)
    _describe(plan, strategy, config)
    runner = Runner(
        strategy,
        batches,
        watch=group.watch,
        hooks=_hooks(config, material),
        work_dir=work_dir,
        seed=runtime.seed,
        trackers=config.log.trackers,
        launcher=launcher,
        write_model=lambda folder, weights: write_model(material, folder, weights),
    )
    runner.set_loop(
        plan=plan, compute_dtype=material.dtype, seed=runtime.seed, max_nonfinite_steps=runtime.max_nonfinite_steps
    )
    return runner


def _describe(plan: Plan, strategy: Strategy, config: TrainConfig) -> None:
    """How many steps of what size, on how many devices: the one place where it is said."""
    schedule, size = config.schedule, config.parallel.sequence_parallel_size
    shared = f', {size} devices a pack' if size > 1 else ''
    logger.info(
        'plan: %d items, %d steps, warm-up %d; %d device%s (%s%s); a step is %d x %d x %d = %d items (batch x '
        'accumulated x %s), up to %s tokens',
        plan.num_items,
        plan.num_steps,
        plan.num_warmup_steps,
        strategy.world_size,
        's' * (strategy.world_size > 1),
        strategy.name,
        shared,
        schedule.batch_size,
        schedule.accumulative_counts,
        plan.world_size,
        plan.items_per_step,
        'devices' if size == 1 else 'groups of devices',
        f'{plan.items_per_step * config.dataset.max_length:,}',
    )


def _hooks(config: TrainConfig, material: Material) -> list[Any]:
    samples, interval = config.samples, config.checkpoint.interval
    validation = []
    if material.validation is not None:
        validation = [
            ValidateHook(
                material.validation, pad_id=material.pad_id, batch_size=config.schedule.batch_size, interval=interval
            )
        ]
    return [
        DatasetInfoHook(material.dataset, material.tokenizer),
        EvaluateChatHook(
            material.tokenizer,
            material.template,
            samples.prompts,
            system=samples.system,
            every_n_iters=samples.interval,
            max_new_tokens=samples.max_new_tokens,
        ),
        LogHook(config.log.interval),
        *validation,
        CheckpointHook(interval, config.checkpoint.max_keep),
        *[build(hook, f'hooks[{i}]') for i, hook in enumerate(config.hooks)],
    ]
