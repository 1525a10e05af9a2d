"""What a run is made of: tokenizer, data, base model and adapter, loaded the cheap ones first."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtuner.adapters.attach import (
    Provenance,
    attach_adapter,
    needs_base_weights,
    trainable_parameters,
)
from xtuner.adapters.load import load_adapter
from xtuner.config.deepspeed import stage_of
from xtuner.config.schema import RuntimeConfig, TrainConfig
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.stream import PackStream
from xtuner.dataset.templates.builtin import Template, get_template
from xtuner.engine.distributed.launch import RankInfo
from xtuner.fused.enable import FusedTraining, enable_fused_training
from xtuner.model.check import check_vocabulary
from xtuner.model.generation_settings import generation_settings, write_generation_settings
from xtuner.model.loading import load_model, load_tokenizer
from xtuner.model.precision import default_device, dtype_name
from xtuner.model.sharded_loading import ShardSpec, num_parameters
from xtuner.model.tokenizer_files import shrink_tokenizer
from xtuner.model.weights.files import apply_umask
from xtuner.model.weights.reader import fingerprint, open_weights
from xtuner.objectives.load import make_objective
from xtuner.objectives.model import TrainingModel
from xtuner.tracking.model_card import prompt_example, write_card

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class RunInputs:
    """What is read before the model: the conversations and what encodes them."""

    model_folder: Path
    base_fingerprint: str
    tokenizer: Any
    template: Template
    dataset: Any
    validation: Any
    generation: dict[str, Any]

    @property
    def pad_id(self) -> int:
        """Fills rows up; any id will do, since nothing looks at padding."""
        return self.tokenizer.pad_token_id or 0


def load_data(config: TrainConfig, folder: Path, group: RankInfo) -> RunInputs:
    """Reads the tokenizer of the base model in `folder`; prepares the conversations or takes them from the cache."""
    source = config.model
    base_fingerprint = fingerprint(open_weights(folder))
    tokenizer = load_tokenizer(folder, trust_remote_code=source.trust_remote_code)
    template = get_template(source.template, tokenizer)
    tokenizer.chat_template = template.chat_template()
    generation = generation_settings(folder, template.stop_ids(tokenizer))  # now: a checkpoint must not fail on it
    size = config.parallel.sequence_parallel_size
    dataset = _open_dataset(config, tokenizer, template, group.rank // size, group.world_size // size)
    validation = prepare_dataset(config.dataset, tokenizer=tokenizer, template=template, part='val')
    if group.watch is not None:  # nodes without a common cache prepare it each for themselves
        group.watch.gather('data')
    return RunInputs(folder, base_fingerprint, tokenizer, template, dataset, validation, generation)


def load_for_training(
    config: TrainConfig,
    data: RunInputs,
    *,
    dtype: torch.dtype,
    checkpoint: Path | None,
    strategy: str = 'single',
    share: ShardSpec | None = None,
) -> TrainingModel:
    """The base model with its adapter, on its device, ready to be trained.

    Args:
        config: The run's config.
        data: What `load_data` found.
        dtype: The compute dtype.
        checkpoint: Whose adapter, or whole weights, to begin with; None: a new adapter on the base.
        strategy: Name of the strategy that it is for.
        share: This rank's part of what is sharded.
    """
    started = time.perf_counter()
    # A whole model that is trained needs its weights in float32; a frozen one only computes.
    start_folder = checkpoint if checkpoint and config.adapter is None else data.model_folder
    base = load_model(
        start_folder,
        dtype=dtype if config.adapter else torch.float32,
        quantization=config.quantization,
        attention=config.model.attention,
        device=default_device(),
        trust_remote_code=config.model.trust_remote_code,
        sharded=strategy == 'fsdp',
        share=share if strategy == 'fsdp' and not needs_base_weights(config.adapter) else None,
    )
    check_vocabulary(data.tokenizer, base, data.model_folder)
    model = _adapted(base, config, checkpoint, data.base_fingerprint)
    path = _prepare_for_training(model, config.runtime, strategy)
    _describe(model, config, time.perf_counter() - started)
    logger.info('%s', path)
    return TrainingModel(model, make_objective(config.objective))


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


def _prepare_for_training(model: Any, runtime: RuntimeConfig, strategy: str) -> FusedTraining:
    if runtime.activation_checkpointing:  # 'auto' too: batches off the fused path recompute all layers
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    trainable_parameters(model)
    by_memory = runtime.activation_checkpointing == 'auto'
    return enable_fused_training(
        model,
        enabled=runtime.fast and stage_of(strategy) != 'deepspeed_zero3',  # whose weights come by module hooks alone
        recompute_by_memory=by_memory,
        fp8=runtime.fp8,
        sharded=strategy == 'fsdp',
    )


def _describe(model: nn.Module, config: TrainConfig, seconds: float) -> None:
    parameters = list(model.parameters())
    total, trained = num_parameters(model), num_parameters(model, trained=True)
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


def write_model(
    config: TrainConfig,
    data: RunInputs,
    model: TrainingModel,
    dtype: torch.dtype,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    training: dict[str, Any] | None = None,
) -> None:
    """Writes the adapter, or the whole model, with its tokenizer, generation settings and provenance.

    Args:
        config: The run's config.
        data: What `load_data` found.
        model: What was trained.
        dtype: The compute dtype.
        folder: Where to.
        weights: Whole trained tensors by name, where the model itself holds parts; None: it holds them.
        training: What the model card tables.
    """
    llm: Any = model.llm
    llm.save_pretrained(folder, safe_serialization=True, state_dict=weights)
    apply_umask(folder)
    write_generation_settings(folder, data.generation)
    data.tokenizer.save_pretrained(folder)
    if config.adapter is not None:
        shrink_tokenizer(folder)
    provenance = Provenance(
        base=config.model.path,
        base_fingerprint=data.base_fingerprint,
        template=config.model.template,
        compute_dtype=dtype_name(dtype),
        quantization=asdict(config.quantization) if config.quantization else None,
        training=training,
    )
    provenance.write(folder)
    write_card(folder, provenance, kind='adapter' if config.adapter else 'full', example=prompt_example(data.tokenizer))
