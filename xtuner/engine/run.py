"""A config to a trained model: what `xtuner train` does, in the order it does it.

What is cheap to check comes first: a wrong argument fails in a second, wrong data before the model is loaded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import set_random_seed
from torch import nn

from xtuner.config.schema import TrainConfig
from xtuner.dataset.cache.store import PreparedDataset
from xtuner.dataset.conversation import Message
from xtuner.dataset.first_prompts import first_prompts
from xtuner.dataset.mapping.recorded_formats import with_recorded_formats
from xtuner.dataset.probe import write_probe
from xtuner.dataset.templates.template import Template
from xtuner.engine.batches import MicroBatches, make_plan
from xtuner.engine.build import RunInputs, load_data, load_for_training, write_model
from xtuner.engine.checkpoint.disk_space import check_space, checkpoint_bytes
from xtuner.engine.checkpoint.resume import (
    NEW_RUN,
    ResumeOptions,
    check_resumable,
    check_weights_folder,
    find_checkpoint,
    open_work_dir,
)
from xtuner.engine.checkpoint.run_lock import exclusive_run_dir
from xtuner.engine.checkpoint.run_manifest import describe_run, format_of_run, recorded_formats, write_run
from xtuner.engine.checkpoint.store import checkpoint_folder, has_checkpoint, list_checkpoints
from xtuner.engine.distributed import Strategy, choose_strategy, make_strategy
from xtuner.engine.distributed.launch import RankInfo, process_group, sequence_group
from xtuner.engine.hooks import CheckpointHook, DatasetInfoHook, EvaluateChatHook, LogHook, ValidateHook
from xtuner.engine.metadata import run_metadata, training_facts
from xtuner.engine.packing import with_supported_packing
from xtuner.engine.preflight import check_memory, memory_advice
from xtuner.engine.runner import Runner
from xtuner.engine.schedule import TrainingSchedule, few_steps_note
from xtuner.engine.signals import StopRequest
from xtuner.errors import ConfigError, XTunerError
from xtuner.fused.enable import check_fp8, check_heads, sync_once_per_step
from xtuner.model.loading import load_config, resolve_model
from xtuner.model.precision import compute_dtype, default_device, dtype_name
from xtuner.model.sharded_loading import ShardSpec, num_parameters
from xtuner.objectives.load import make_objective, objective_code
from xtuner.objectives.model import TrainingModel
from xtuner.objectives.model_checks import check_family
from xtuner.registry import build, check_arguments
from xtuner.tracking.metadata import latest_losses
from xtuner.tracking.report.page import try_to_report
from xtuner.tracking.sessions import record_session
from xtuner.utils.units import counted

logger = logging.getLogger('xtuner')


def train(config: TrainConfig, *, work_dir: Path, start: ResumeOptions = NEW_RUN, launcher: str = 'none') -> Path:
    """Runs a config to its end and returns the last checkpoint's folder.

    Args:
        config: A checked config.
        work_dir: Made where it is missing; must hold no checkpoints unless `start` says to go on from them.
        start: Anew, exactly where another run was stopped, or with another's weights.
        launcher: 'none', or who started this process as one of several: 'pytorch' or 'slurm'.

    Raises:
        XTunerError: anything a user can mend, before or during the run.
    """
    _check_open_sections(config)
    with (
        process_group(launcher, timeout_s=config.parallel.timeout_s) as group,
        exclusive_run_dir(work_dir) if group.rank == 0 else nullcontext(),
    ):
        checkpoint = find_checkpoint(work_dir, start, rank=group.rank)
        num_steps = _run(config, work_dir, checkpoint, start, launcher, group)
    # A run that had nothing left to do wrote none, and may have begun from elsewhere.
    written = checkpoint_folder(work_dir, num_steps)
    last = checkpoint if checkpoint and not has_checkpoint(work_dir, num_steps) else written
    logger.info('done: %s', last)
    return last


def _run(
    config: TrainConfig,
    work_dir: Path,
    checkpoint: Path | None,
    start: ResumeOptions,
    launcher: str,
    group: RankInfo,
) -> int:
    """Trains, and returns the number of optimizer steps of the whole run."""
    device = default_device()
    dtype = compute_dtype(config.model.dtype, device)
    objective = make_objective(config.objective)
    name = choose_strategy(config, group.world_size, dtype=dtype_name(dtype), objective=objective)
    if config.runtime.fp8:
        check_fp8(device)
    set_random_seed(config.runtime.seed)
    recorded = recorded_formats(checkpoint) if checkpoint is not None else {}
    if checkpoint is not None:
        config = replace(config, dataset=with_recorded_formats(config.dataset, recorded))
    source = config.model
    folder = resolve_model(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    model_config = load_config(folder, trust_remote_code=source.trust_remote_code)
    config = with_supported_packing(config, model_config, checkpoint=checkpoint)
    data = load_data(config, group)
    size = config.parallel.sequence_parallel_size
    check_heads(model_config, size)
    plan = make_plan(data.dataset, config, group.world_size // size)
    if group.rank == 0:
        _warn_of_few_steps(plan, data)
    run = describe_run(
        config,
        base_fingerprint=data.base_fingerprint,
        data_digest=data.dataset.digest,
        compute_dtype=dtype_name(dtype),
        device=device.type if device.type == 'cpu' else torch.cuda.get_device_name(device),
        num_groups=plan.world_size,
        world_size=group.world_size,
        formats={**(recorded or {}), **data.dataset.summary.formats},
        objective_code=objective_code(config.objective),
    )
    if checkpoint is not None:
        run['format'] = format_of_run(checkpoint)
        plan = replace(plan, float_products=run['format'] < 2)
        check_resumable(checkpoint, run, start, work_dir=work_dir, num_steps=plan.num_steps)
    if start.weights is not None:
        check_weights_folder(config, start.weights, data.base_fingerprint)
    check_memory(config, data, device, group.world_size, strategy=name)
    model: Any = load_for_training(
        config, data, dtype=dtype, checkpoint=checkpoint or start.weights, strategy=name,
        share=ShardSpec(group.rank, group.world_size),
    )  # fmt: skip
    if group.rank == 0:
        _check_space(work_dir, config, plan, model, data)
        open_work_dir(work_dir, config, checkpoint)  # only now: a run that could not begin leaves nothing behind
        part = 'training' if data.validation is None else 'validation'
        write_probe(work_dir, data.dataset if data.validation is None else data.validation, part)
    about = run_metadata(config, data, plan, model, dtype) if group.rank == 0 else None
    training = training_facts(config, data, plan, dtype)

    def write(folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Writes a checkpoint's files beside the trainer's state."""
        write_model(config, data, model, dtype, folder, weights, training | latest_losses(work_dir))
        write_run(folder, run)

    with StopRequest() as stop:
        strategy = _make_strategy(config, model, plan, name, group)
        with strategy.whole():
            check_family(model, packed=config.dataset.packing != 'none', max_length=config.dataset.max_length)
        runner = _make_runner(config, data, strategy, plan, dtype, stop, write, work_dir, launcher, group)
        if checkpoint is not None:
            runner.restore(checkpoint)
            runner.train_loop.dataloader.start_step = runner.iter
            logger.info('resuming from %s at step %d', checkpoint, runner.iter)
        try:
            with record_session(work_dir, about, from_step=runner.iter, at_end=try_to_report):
                runner.train()
        finally:
            runner.visualizer.close()
    return plan.num_steps


def _warn_of_few_steps(plan: TrainingSchedule, data: RunInputs) -> None:
    dataset = data.dataset
    if note := few_steps_note(plan, len(dataset.sample_numbers) if isinstance(dataset, PreparedDataset) else None):
        logger.warning('plan: %s', note)


def _check_space(
    work_dir: Path, config: TrainConfig, plan: TrainingSchedule, model: TrainingModel, data: RunInputs
) -> None:
    """Whether all the checkpoints that will be there at a time have room; one more than are kept, while it is saved."""
    num_saves = math.ceil(plan.num_steps / config.checkpoint.interval)
    kept = config.checkpoint.max_keep + (data.validation is not None and config.checkpoint.keep_best)
    most = num_saves if config.checkpoint.max_keep < 1 else min(num_saves, kept + 1)
    missing = most - len(list_checkpoints(work_dir))
    if missing > 0:
        trained = torch.empty(num_parameters(model, trained=True), device='meta')  # all in float32
        size = checkpoint_bytes([trained])
        check_space(work_dir, missing * size, '1 checkpoint would' if missing == 1 else f'{missing} checkpoints')


def _check_open_sections(config: TrainConfig) -> None:
    build(config.optimizer, 'optimizer', [nn.Parameter(torch.zeros(1))])  # refuses its values now, not after loading
    if config.adapter is not None:
        build(config.adapter, 'adapter')
    make_objective(config.objective)
    for i, hook in enumerate(config.hooks):
        check_arguments(hook, f'hooks[{i}]')
    for name in config.log.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f"`log.trackers` names {name}, which is not installed; pip install 'xtuner[trackers]', or leave it out"
            )


def _make_strategy(
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


def _make_runner(
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
