"""A config to a trained model: what `xtuner train` does, in the order it does it.

What is cheap to check comes first: a wrong argument fails in a second, wrong data before the model is loaded.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import set_random_seed
from torch import nn

from xtuner.config.flatten import flatten
from xtuner.config.schema import TrainConfig
from xtuner.dataset.pipeline import prepare_dataset
from xtuner.dataset.stream import PackStream
from xtuner.dataset.template import Template, get_template
from xtuner.engine.batches import MicroBatches, make_plan
from xtuner.engine.checkpoints import LAST_FILE, list_checkpoints, newest_checkpoint, verify_checkpoint
from xtuner.engine.hooks import CheckpointHook, DatasetInfoHook, EvaluateChatHook, LogHook, ValidateHook
from xtuner.engine.launch import process_group
from xtuner.engine.runner import Runner
from xtuner.errors import CheckpointError, ConfigError
from xtuner.model.adapter import Provenance, attach_adapter, load_adapter, trainable_parameters
from xtuner.model.fast import enable_fast_path, wait_once_a_step
from xtuner.model.loading import load_model, load_tokenizer, resolve_model
from xtuner.model.precision import compute_dtype, default_device, dtype_name
from xtuner.model.sft import SupervisedFinetune
from xtuner.model.weights import fingerprint, open_weights
from xtuner.registry import build, check_arguments

logger = logging.getLogger('xtuner')

# Sentinel for `resume`: the newest whole checkpoint in the work folder.
NEWEST = 'newest'


@dataclass(frozen=True)
class Material:
    """What a run is made of, once it is loaded."""

    model: SupervisedFinetune
    tokenizer: Any
    template: Template
    dataset: Any
    validation: Any
    provenance: Provenance
    dtype: torch.dtype

    @property
    def pad_id(self) -> int:
        """Fills rows up; any id will do, since nothing looks at padding."""
        return self.tokenizer.pad_token_id or 0


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
    with process_group(launcher) as (rank, world_size):
        _run(config, work_dir, checkpoint, launcher, rank, world_size)
    last = work_dir / (work_dir / LAST_FILE).read_text(encoding='utf-8').strip()
    logger.info('done: %s', last)
    return last


def _run(
    config: TrainConfig, work_dir: Path, checkpoint: Path | None, launcher: str, rank: int, world_size: int
) -> None:
    set_random_seed(config.runtime.seed)
    material = _load(config, checkpoint, rank, world_size)
    _open_work_dir(work_dir, config)  # only now: a run that could not begin leaves nothing behind
    runner = _make_runner(config, material, work_dir, launcher, rank, world_size)
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


def _load(config: TrainConfig, checkpoint: Path | None, rank: int, world_size: int) -> Material:
    """Tokenizer, data, base and adapter, the cheap ones first."""
    source = config.model
    folder = resolve_model(source.path, revision=source.revision, trust_remote_code=source.trust_remote_code)
    base_fingerprint = fingerprint(open_weights(folder))
    tokenizer = load_tokenizer(folder, trust_remote_code=source.trust_remote_code)
    template = get_template(source.template, tokenizer)
    tokenizer.chat_template = template.chat_template()
    dataset = _open_dataset(config, tokenizer, template, rank, world_size)
    validation = prepare_dataset(config.dataset, tokenizer=tokenizer, template=template, part='val')
    device = default_device()
    dtype = compute_dtype(source.dtype, device)
    started = time.perf_counter()
    # A whole model that is trained needs its weights in float32; a frozen one only computes.
    start_folder = checkpoint if checkpoint and config.adapter is None else folder
    base = load_model(
        start_folder,
        dtype=dtype if config.adapter else torch.float32,
        quantization=config.quantization,
        attention=source.attention,
        device=device,
        trust_remote_code=source.trust_remote_code,
    )
    model = _adapted(base, config, checkpoint, base_fingerprint)
    _prepare_for_training(model, config)
    _describe(model, config, time.perf_counter() - started)
    logger.info('%s', enable_fast_path(model, enabled=config.runtime.fast))
    provenance = Provenance(
        base=source.path,
        base_fingerprint=base_fingerprint,
        template=source.template,
        compute_dtype=dtype_name(dtype),
        quantization=asdict(config.quantization) if config.quantization else None,
    )
    return Material(SupervisedFinetune(model), tokenizer, template, dataset, validation, provenance, dtype)


def _open_dataset(config: TrainConfig, tokenizer: Any, template: Template, rank: int, world_size: int) -> Any:
    if config.dataset.streaming:
        return PackStream(config.dataset, tokenizer=tokenizer, template=template, rank=rank, world_size=world_size)
    return prepare_dataset(config.dataset, tokenizer=tokenizer, template=template)


def _adapted(base: Any, config: TrainConfig, checkpoint: Path | None, base_fingerprint: str) -> Any:
    if config.adapter is None:
        return base.requires_grad_(True)
    if checkpoint is not None:
        return load_adapter(base, checkpoint, trainable=True, base_fingerprint=base_fingerprint)
    adapted = attach_adapter(base, config.adapter)
    adapted.peft_config['default'].base_model_name_or_path = config.model.path
    return adapted


def _prepare_for_training(model: Any, config: TrainConfig) -> None:
    if config.runtime.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    trainable_parameters(model)


def _describe(model: nn.Module, config: TrainConfig, seconds: float) -> None:
    parameters = list(model.parameters())
    # A 4-bit weight is stored as packed bytes; its logical size is in its quantisation state.
    states = [getattr(p, 'quant_state', None) for p in parameters]
    total = sum(p.numel() if s is None else s.shape.numel() for p, s in zip(parameters, states, strict=True))
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    held = f'{config.quantization.bits} bit' if config.quantization else dtype_name(parameters[0].dtype)
    logger.info(
        'model: %s, %.4g M parameters (base in %s), %.4g M trained (%.2f %%), loaded in %.1f s',
        config.model.path,
        total / 1e6,
        held,
        trained / 1e6,
        100 * trained / total,
        seconds,
    )


def _make_runner(
    config: TrainConfig, material: Material, work_dir: Path, launcher: str, rank: int, world_size: int
) -> Runner:
    schedule, runtime = config.schedule, config.runtime
    plan = make_plan(material.dataset, config, world_size)
    batches = MicroBatches(material.dataset, config, plan, pad_id=material.pad_id, rank=rank)
    optimizer = build(config.optimizer, 'optimizer', trainable_parameters(material.model).values())
    if runtime.fast:
        wait_once_a_step(optimizer)
    logger.info(
        'plan: %d items, %d steps of %d x %d x %d (accumulated x batch x devices), warm-up %d steps',
        plan.num_items,
        plan.num_steps,
        schedule.accumulative_counts,
        schedule.batch_size,
        world_size,
        plan.num_warmup_steps,
    )
    runner = Runner(
        material.model,
        optimizer,
        batches,
        hooks=_hooks(config, material),
        work_dir=work_dir,
        seed=runtime.seed,
        trackers=config.log.trackers,
        launcher=launcher,
        write_model=lambda folder: _write_model(material, folder),
    )
    runner.set_loop(
        plan=plan, compute_dtype=material.dtype, seed=runtime.seed, max_nonfinite_steps=runtime.max_nonfinite_steps
    )
    return runner


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


def _write_model(material: Material, folder: Path) -> None:
    """The adapter, or the whole model, with its tokenizer and generation settings."""
    llm: Any = material.model.llm
    stop_ids = material.template.stop_ids(material.tokenizer)
    llm.generation_config.eos_token_id = stop_ids
    llm.save_pretrained(folder, safe_serialization=True)
    llm.generation_config.save_pretrained(folder)
    material.tokenizer.save_pretrained(folder)
    material.provenance.write(folder)
