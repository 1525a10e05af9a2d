"""A config to a trained model: what `xtuner train` does, in the order it does it.

What is cheap to check comes first: a wrong argument fails in a second, wrong data before the model is loaded.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import set_random_seed
from torch import nn

from xtuner.config.schema import TrainConfig
from xtuner.dataset.cache.store import PreparedDataset
from xtuner.dataset.mapping.recorded_formats import with_recorded_formats
from xtuner.dataset.probe import write_probe
from xtuner.engine.assemble import assemble_runner, assemble_strategy, check_checkpoint_space
from xtuner.engine.batches import make_plan
from xtuner.engine.build import RunInputs, load_data, load_for_training, write_model
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
from xtuner.engine.checkpoint.store import checkpoint_folder, has_checkpoint
from xtuner.engine.distributed import choose_strategy
from xtuner.engine.distributed.launch import RankInfo, process_group
from xtuner.engine.metadata import run_metadata, training_facts
from xtuner.engine.packing import with_supported_packing
from xtuner.engine.preflight import check_memory
from xtuner.engine.schedule import TrainingSchedule, few_steps_note
from xtuner.engine.signals import StopRequest
from xtuner.engine.step.checks import dead_worker_message, is_dead_worker
from xtuner.errors import ConfigError, TrainingError
from xtuner.fused.enable import check_fp8, check_heads
from xtuner.model.loading import load_config, resolve_model
from xtuner.model.precision import compute_dtype, default_device, dtype_name
from xtuner.model.sharded_loading import ShardSpec
from xtuner.objectives.load import make_objective, objective_code
from xtuner.objectives.model_checks import check_family
from xtuner.registry import build, check_arguments
from xtuner.tracking.metadata import latest_losses
from xtuner.tracking.report.page import try_to_report
from xtuner.tracking.sessions import record_session

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
        prepared = _prepare(config, work_dir, checkpoint, start, group)
        try:
            _run(prepared, work_dir, launcher, group)
        except RuntimeError as error:  # raised wherever the main thread is when a worker dies
            if not is_dead_worker(error):
                raise
            raise TrainingError(dead_worker_message(error)) from error
    # A run that had nothing left to do wrote none, and may have begun from elsewhere.
    written = checkpoint_folder(work_dir, prepared.schedule.num_steps)
    last = checkpoint if checkpoint and not has_checkpoint(work_dir, prepared.schedule.num_steps) else written
    logger.info('done: %s', last)
    return last


@dataclass(frozen=True)
class PreparedRun:
    """A run before its model is loaded: all that can be wrong with its config and data has been checked.

    Attributes:
        config: The config in force, with the formats and the packing that the run uses.
        device: Of this rank.
        dtype: Of the products.
        strategy: Its name.
        data: Tokenizer, template, training and validation data.
        schedule: Which items each step takes.
        manifest: What `run.json` records.
        checkpoint: Where the run goes on from, or None.
        weights: The checkpoint whose adapter it begins with, or None.
    """

    config: TrainConfig
    device: torch.device
    dtype: torch.dtype
    strategy: str
    data: RunInputs
    schedule: TrainingSchedule
    manifest: dict[str, Any]
    checkpoint: Path | None
    weights: Path | None


def _prepare(
    config: TrainConfig, work_dir: Path, checkpoint: Path | None, start: ResumeOptions, group: RankInfo
) -> PreparedRun:
    """Everything up to the model, the cheap checks first."""
    device = default_device()
    dtype = compute_dtype(config.model.dtype, device)
    objective = make_objective(config.objective)
    strategy = choose_strategy(config, group.world_size, dtype=dtype_name(dtype), objective=objective)
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
    data = load_data(config, folder, group)
    check_heads(model_config, config.parallel.sequence_parallel_size)
    schedule = make_plan(data.dataset, config, group.world_size // config.parallel.sequence_parallel_size)
    if group.rank == 0:
        _warn_of_few_steps(schedule, data)
    manifest = describe_run(
        config,
        base_fingerprint=data.base_fingerprint,
        data_digest=data.dataset.digest,
        compute_dtype=dtype_name(dtype),
        device=device.type if device.type == 'cpu' else torch.cuda.get_device_name(device),
        num_groups=schedule.world_size,
        world_size=group.world_size,
        formats={**(recorded or {}), **data.dataset.summary.formats},
        objective_code=objective_code(config.objective),
    )
    if checkpoint is not None:
        manifest['format'] = format_of_run(checkpoint)
        schedule = replace(schedule, float_products=manifest['format'] < 2)
        check_resumable(checkpoint, manifest, start, work_dir=work_dir, num_steps=schedule.num_steps)
    if start.weights is not None:
        check_weights_folder(config, start.weights, data.base_fingerprint)
    check_memory(config, data, device, group.world_size, strategy=strategy)
    return PreparedRun(config, device, dtype, strategy, data, schedule, manifest, checkpoint, start.weights)


def _run(prepared: PreparedRun, work_dir: Path, launcher: str, group: RankInfo) -> None:
    """Loads the model and trains it to the end of the run."""
    config, data, schedule, dtype = prepared.config, prepared.data, prepared.schedule, prepared.dtype
    checkpoint = prepared.checkpoint
    model: Any = load_for_training(
        config, data, dtype=dtype, checkpoint=checkpoint or prepared.weights, strategy=prepared.strategy,
        share=ShardSpec(group.rank, group.world_size),
    )  # fmt: skip
    if group.rank == 0:
        check_checkpoint_space(work_dir, config, schedule, model, data)
        open_work_dir(work_dir, config, checkpoint)  # only now: a run that could not begin leaves nothing behind
        part = 'training' if data.validation is None else 'validation'
        write_probe(work_dir, data.dataset if data.validation is None else data.validation, part)
    about = run_metadata(config, data, schedule, model, dtype) if group.rank == 0 else None
    training = training_facts(config, data, schedule, dtype)

    def write(folder: Path, weights: dict[str, torch.Tensor] | None) -> None:
        """Writes a checkpoint's model files and manifest."""
        write_model(config, data, model, dtype, folder, weights, training | latest_losses(work_dir))
        write_run(folder, prepared.manifest)

    with StopRequest() as stop:
        strategy = assemble_strategy(config, model, schedule, prepared.strategy, group)
        with strategy.whole():
            check_family(model, packed=config.dataset.packing != 'none', max_length=config.dataset.max_length)
        runner = assemble_runner(config, data, strategy, schedule, dtype, stop, write, work_dir, launcher, group)
        if checkpoint is not None:
            runner.restore(checkpoint)
            runner.train_loop.dataloader.start_step = runner.iter
            logger.info('resuming from %s at step %d', checkpoint, runner.iter)
        try:
            with record_session(work_dir, about, from_step=runner.iter, at_end=try_to_report):
                runner.train()
        finally:
            runner.visualizer.close()


def _warn_of_few_steps(plan: TrainingSchedule, data: RunInputs) -> None:
    dataset = data.dataset
    if note := few_steps_note(plan, len(dataset.sample_numbers) if isinstance(dataset, PreparedDataset) else None):
        logger.warning('plan: %s', note)


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
