"""Estimates a run from its config: memory, tokens, steps, disk space; without weights and without a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtuner.config.schema import TrainConfig
from xtuner.engine.checkpoint.disk_space import OVERHEAD_BYTES
from xtuner.engine.schedule import TrainingSchedule
from xtuner.fused.recompute import activation_budget_bytes, num_recomputed_layers
from xtuner.memory.dims import ModelDims, model_dims
from xtuner.memory.predict import Prediction, Setup, predict_memory
from xtuner.memory.terms import CONTEXT_BYTES, base_weights, input_embedding, library_space, trained_weights
from xtuner.model.loading import load_config
from xtuner.registry import reference, resolve


@dataclass(frozen=True)
class DataSize:
    """Size of a run's data.

    Attributes:
        num_items: Packs, or conversations if each has its own row.
        num_tokens: Total tokens.
        longest: Tokens of the longest item.
        target_share: Share of tokens that are trained.
        num_samples: Conversations in the items; 0: unknown.
    """

    num_items: int
    num_tokens: int
    longest: int
    target_share: float
    num_samples: int = 0


def is_predicted(config: TrainConfig, strategy: str) -> bool:
    """Whether every process holds all weights and whole packs, as the prediction assumes."""
    return strategy in ('auto', 'single', 'ddp') and config.parallel.sequence_parallel_size == 1


@dataclass(frozen=True)
class MemorySaving:
    """A setting that reduces memory.

    Attributes:
        text: The setting.
        saved: Bytes that it saves.
    """

    text: str
    saved: int


def data_size(dataset: Any) -> DataSize:
    """Returns the size of a `PreparedDataset`."""
    summary = dataset.summary
    return DataSize(
        num_items=len(dataset),
        num_tokens=int(dataset.lengths.sum()),
        longest=int(dataset.lengths.max()),
        target_share=summary.target_tokens / max(1, summary.tokens),
        num_samples=len(dataset.sample_numbers),
    )


def dims_of(config: TrainConfig, folder: Path) -> ModelDims:
    """Returns the dimensions of a config's model and adapter.

    Args:
        config: A validated config.
        folder: The base model's folder; only its `config.json` is read.

    Raises:
        XTunerError: The folder contains no known model, or the adapter does not fit it.
    """
    trusted = config.model.trust_remote_code
    return model_dims(load_config(folder, trust_remote_code=trusted), config.adapter, trust_remote_code=trusted)


def setup_of(
    config: TrainConfig,
    dims: ModelDims,
    *,
    data: DataSize | None = None,
    world_size: int = 1,
    free: int | None = None,
) -> Setup:
    """Returns what the memory of a config's step on one GPU depends on.

    Args:
        config: A validated config.
        dims: From `dims_of`.
        data: Size of the data, if known; otherwise rows are assumed to be full and all tokens trained.
        world_size: Number of devices.
        free: Free bytes of the GPU before loading, which `activation_checkpointing = 'auto'` uses. None: the minimum
            memory, with all layers recomputed.
    """
    packed = config.dataset.packing != 'none' or data is None
    row = config.dataset.max_length if packed or data is None else data.longest
    recompute = config.runtime.activation_checkpointing
    setup = Setup(
        dims,
        tokens=row * config.schedule.batch_size,
        longest=row,
        bits=config.quantization.bits if config.quantization else None,
        double_quant=bool(config.quantization and config.quantization.double_quant),
        value_bytes=4 if config.model.dtype == 'fp32' else 2,
        checkpointing=bool(recompute),
        fast=config.runtime.fast,
        accumulated=config.schedule.accumulative_counts > 1,
        world_size=world_size,
        target_share=data.target_share if data else 1.0,
        **optimizer_memory(config.optimizer),
    )
    if recompute != 'auto' or free is None or not setup.on_fast_path:
        return setup
    return replace(setup, num_recomputed=_recomputed_by_memory(setup, free))


def _recomputed_by_memory(setup: Setup, free: int) -> int:
    """Number of layers that the fused path will recompute on a GPU with so much free memory."""
    held = sum(term(setup) for term in (base_weights, input_embedding, trained_weights, library_space))
    budget = activation_budget_bytes(free - held - CONTEXT_BYTES, setup.dims.num_trained, 'cuda')
    assert setup.dims.parts is not None
    return num_recomputed_layers(
        setup.dims.parts, setup.group_ranks, setup.dims.num_layers,
        tokens=setup.tokens, item_bytes=setup.value_bytes, budget=budget,
    )  # fmt: skip


def optimizer_memory(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the bytes of optimizer state per trained element, by the optimizer's name.

    Returns:
        `optimizer_bytes`, `paged` and `optimizer_spare` of `Setup`. Two float32 moments for unknown names.
    """
    name = reference(resolve(section['type']))
    module, _, name = name.partition(':')
    momentum = bool(section.get('momentum'))
    moments = {'SGD': momentum, 'Lion': 1, 'PagedLion': 1, 'Adagrad': 1, 'RMSprop': 1 + momentum}
    bits = 8 if '8bit' in name or section.get('optim_bits') == 8 else 32
    count = moments.get(name.removesuffix('8bit').removesuffix('32bit'), 2)
    # torch updates all parameters at once with one temporary value for each; bitsandbytes updates in place.
    spare = 4 if module.startswith('torch') and count and not section.get('fused') else 0
    return {'optimizer_bytes': count * bits / 8, 'paged': name.startswith('Paged'), 'optimizer_spare': spare}


def checkpoint_bytes(setup: Setup) -> int:
    """Disk space of one checkpoint: trained weights in float32, optimizer state, tokenizer and settings."""
    return int((4 + setup.optimizer_bytes) * setup.dims.num_trained) + OVERHEAD_BYTES


def plan_of(config: TrainConfig, data: DataSize | None, world_size: int) -> TrainingSchedule | None:
    """Returns the run's schedule; None if neither the data nor `schedule.max_steps` determines it."""
    schedule = config.schedule
    if data is not None:
        return TrainingSchedule(data.num_items, schedule, world_size)
    if schedule.max_steps is None:
        return None
    per_step = schedule.batch_size * schedule.accumulative_counts * world_size
    return TrainingSchedule(schedule.max_steps * per_step, schedule, world_size)


def memory_savings(config: TrainConfig, setup: Setup, *, least_saved: int = 2**20) -> list[MemorySaving]:
    """Settings that would save more than `least_saved` bytes, the most effective first."""
    schedule, dims = config.schedule, setup.dims
    changes: list[tuple[str, dict[str, Any]]] = []
    if schedule.batch_size > 1:
        half = schedule.batch_size // 2
        text = f'schedule.batch_size={half} schedule.accumulative_counts={schedule.accumulative_counts * 2}'
        changes.append((text, {'tokens': setup.longest * half, 'accumulated': True}))
    if setup.recomputed_layers < dims.num_layers - 1:
        changes.append(('runtime.activation_checkpointing=True', {'checkpointing': True, 'num_recomputed': None}))
    if setup.bits is None and not setup.full:
        changes.append(('quantization.bits=4', {'bits': 4, 'double_quant': True}))
    if setup.full:
        changes.append(('a lora or qlora config instead of full training', _as_lora(setup)))
    if not setup.fast and not dims.unsupported_reason:
        changes.append(('runtime.fast=True', {'fast': True}))
    if not setup.paged and setup.optimizer_bytes:
        changes.append(('optimizer.type=bitsandbytes.optim:PagedAdamW8bit', {'paged': True, 'optimizer_spare': 0}))
    length = config.dataset.max_length
    changes.append((f'dataset.max_length={length // 2}', {'tokens': setup.tokens // 2, 'longest': setup.longest // 2}))
    if config.adapter and isinstance(config.adapter.get('r'), int) and config.adapter['r'] >= 16:
        smaller = replace(dims, num_trained=dims.num_trained // 2, ranks=tuple(r // 2 for r in dims.ranks))
        changes.append((f'adapter.r={config.adapter["r"] // 2}', {'dims': smaller}))
    now = predict_memory(setup).on_gpu
    savings = [MemorySaving(text, now - predict_memory(replace(setup, **change)).on_gpu) for text, change in changes]
    return sorted((saving for saving in savings if saving.saved > least_saved), key=lambda saving: -saving.saved)


def _as_lora(setup: Setup) -> dict[str, Any]:
    """Changes full training to LoRA with about 2 % of the weights."""
    dims = replace(setup.dims, num_trained=setup.dims.num_base // 50)
    return {'dims': dims, 'bits': None}


@dataclass(frozen=True)
class Estimate:
    """The result of `xtuner estimate`.

    Attributes:
        setup: The inputs of the memory prediction.
        memory: The prediction.
        least: The prediction with all layers recomputed, the fallback of `auto`; None if equal to `memory`.
        data: Size of the data; None if unknown.
        plan: The schedule; None if unknown.
        checkpoint_bytes: Size of one checkpoint.
        num_checkpoints: Maximum number on disk at once: those kept and the one being written.
    """

    setup: Setup
    memory: Prediction
    least: Prediction | None
    data: DataSize | None
    plan: TrainingSchedule | None
    checkpoint_bytes: int
    num_checkpoints: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serializable dict."""
        steps = self.plan.num_steps if self.plan else None
        memory = dataclasses.asdict(self.memory)
        memory |= {'beside': memory.pop('untracked'), 'moment': memory.pop('phase')}
        return {
            'memory': memory | {'allocated': self.memory.allocated, 'on_card': self.memory.on_gpu},
            'data': dataclasses.asdict(self.data) if self.data else None,
            'steps': steps,
            'tokens_per_step': self.tokens_per_step,
            'checkpoint_bytes': self.checkpoint_bytes,
            'fast_path': self.setup.dims.unsupported_reason or self.setup.on_fast_path,
        }  # fmt: skip

    @property
    def tokens_per_step(self) -> int | None:
        """Average tokens of a full step, or of the only one; None without a schedule."""
        if self.plan is None:
            return None
        return round(self._tokens_per_row * self.plan.largest_step)

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the whole run, computed like `tokens_per_step`."""
        if self.plan is None:
            return None
        return round(self._tokens_per_row * self.plan.num_micro_batches * self.plan.items_per_micro_batch)

    @property
    def _tokens_per_row(self) -> float:
        return self.data.num_tokens / self.data.num_items if self.data else self.setup.longest


def estimate(
    config: TrainConfig, folder: Path, *, data: DataSize | None = None, world_size: int = 1, free: int | None = None
) -> Estimate:
    """Predicts a run.

    Args:
        config: A validated config.
        folder: The base model's folder; only its `config.json` is read.
        data: Size of the data, if known.
        world_size: Number of devices.
        free: Free bytes of the GPU before loading; None: unknown.
    """
    dims = dims_of(config, folder)
    setup = setup_of(config, dims, data=data, world_size=world_size, free=free)
    least = setup_of(config, dims, data=data, world_size=world_size)
    keep = config.checkpoint.max_keep
    return Estimate(
        setup=setup,
        memory=predict_memory(setup),
        least=predict_memory(least) if least != setup else None,
        data=data,
        plan=plan_of(config, data, world_size),
        checkpoint_bytes=checkpoint_bytes(setup),
        num_checkpoints=keep + 1 if keep > 0 else None,
    )
