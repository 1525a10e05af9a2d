"""What a run will take, from its config: memory, tokens, steps, disk; without the weights and without a GPU."""

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
    """The size of a run's data.

    Attributes:
        num_items: Packs, or conversations where each has its own row.
        num_tokens: In all of them.
        longest: Tokens of the longest.
        target_share: Share of the tokens that is trained.
        num_samples: Conversations in the items; 0: not known.
    """

    num_items: int
    num_tokens: int
    longest: int
    target_share: float
    num_samples: int = 0


def is_predicted(config: TrainConfig, strategy: str) -> bool:
    """Whether every process holds all weights and whole packs, which is what the prediction is of."""
    return strategy in ('auto', 'single', 'ddp') and config.parallel.sequence_parallel_size == 1


@dataclass(frozen=True)
class Knob:
    """A setting that takes memory off.

    Attributes:
        text: What to set.
        saved: Bytes that it saves.
    """

    text: str
    saved: int


def data_size(dataset: Any) -> DataSize:
    """The sizes of a `PreparedDataset`."""
    summary = dataset.summary
    return DataSize(
        num_items=len(dataset),
        num_tokens=int(dataset.lengths.sum()),
        longest=int(dataset.lengths.max()),
        target_share=summary.target_tokens / max(1, summary.tokens),
        num_samples=len(dataset.sample_numbers),
    )


def shape_of(config: TrainConfig, folder: Path) -> ModelDims:
    """The model and adapter of a config, counted.

    Args:
        config: A checked config.
        folder: The base model's; only its `config.json` is read.

    Raises:
        XTunerError: the folder holds no model that is known, or the adapter does not fit it.
    """
    trusted = config.model.trust_remote_code
    return model_dims(load_config(folder, trust_remote_code=trusted), config.adapter, trust_remote_code=trusted)


def setup_of(
    config: TrainConfig,
    shape: ModelDims,
    *,
    data: DataSize | None = None,
    world_size: int = 1,
    free: int | None = None,
) -> Setup:
    """What the memory of a config's step on one GPU depends on.

    Args:
        config: A checked config.
        shape: From `shape_of`.
        data: Its data, where that is known; else every row is taken as full and every token as trained.
        world_size: Devices.
        free: Bytes of the GPU before anything is loaded; what `activation_checkpointing = 'auto'` goes by. None: the
            least memory, with all layers computed again.
    """
    packed = config.dataset.packing != 'none' or data is None
    row = config.dataset.max_length if packed or data is None else data.longest
    again = config.runtime.activation_checkpointing
    setup = Setup(
        shape,
        tokens=row * config.schedule.batch_size,
        longest=row,
        bits=config.quantization.bits if config.quantization else None,
        double_quant=bool(config.quantization and config.quantization.double_quant),
        value_bytes=4 if config.model.dtype == 'fp32' else 2,
        checkpointing=bool(again),
        fast=config.runtime.fast,
        accumulated=config.schedule.accumulative_counts > 1,
        world_size=world_size,
        target_share=data.target_share if data else 1.0,
        **optimizer_memory(config.optimizer),
    )
    if again != 'auto' or free is None or not setup.on_fast_path:
        return setup
    return replace(setup, num_recomputed=_again_by_memory(setup, free))


def _again_by_memory(setup: Setup, free: int) -> int:
    """How many layers the fast path will compute again on a GPU with so much free memory."""
    held = sum(term(setup) for term in (base_weights, input_embedding, trained_weights, library_space))
    room = activation_budget_bytes(free - held - CONTEXT_BYTES, setup.dims.num_trained, 'cuda')
    assert setup.dims.parts is not None
    return num_recomputed_layers(
        setup.dims.parts, setup.group_ranks, setup.dims.num_layers,
        tokens=setup.tokens, item_bytes=setup.value_bytes, room=room,
    )  # fmt: skip


def optimizer_memory(section: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes of optimizer state for each trained element, by the optimizer's name.

    Returns:
        `optimizer_bytes`, `paged` and `optimizer_spare` of `Setup`. Two float32 moments where the name tells nothing.
    """
    name = reference(resolve(section['type']))
    module, _, name = name.partition(':')
    momentum = bool(section.get('momentum'))
    moments = {'SGD': momentum, 'Lion': 1, 'PagedLion': 1, 'Adagrad': 1, 'RMSprop': 1 + momentum}
    bits = 8 if '8bit' in name or section.get('optim_bits') == 8 else 32
    count = moments.get(name.removesuffix('8bit').removesuffix('32bit'), 2)
    # torch updates all parameters at once, with one more value for each in between; bitsandbytes in place.
    spare = 4 if module.startswith('torch') and count and not section.get('fused') else 0
    return {'optimizer_bytes': count * bits / 8, 'paged': name.startswith('Paged'), 'optimizer_spare': spare}


def checkpoint_bytes(setup: Setup) -> int:
    """Of one checkpoint on disk: what is trained in float32, its optimizer state, tokenizer and settings."""
    return int((4 + setup.optimizer_bytes) * setup.dims.num_trained) + OVERHEAD_BYTES


def plan_of(config: TrainConfig, data: DataSize | None, world_size: int) -> TrainingSchedule | None:
    """The run's steps; None where neither the data nor `schedule.max_steps` tells them."""
    schedule = config.schedule
    if data is not None:
        return TrainingSchedule(data.num_items, schedule, world_size)
    if schedule.max_steps is None:
        return None
    per_step = schedule.batch_size * schedule.accumulative_counts * world_size
    return TrainingSchedule(schedule.max_steps * per_step, schedule, world_size)


def knobs(config: TrainConfig, setup: Setup, *, least_saved: int = 2**20) -> list[Knob]:
    """Settings that would take memory off, the one that saves most first, and those left out that save too little."""
    schedule, shape = config.schedule, setup.dims
    changes: list[tuple[str, dict[str, Any]]] = []
    if schedule.batch_size > 1:
        half = schedule.batch_size // 2
        text = f'schedule.batch_size={half} schedule.accumulative_counts={schedule.accumulative_counts * 2}'
        changes.append((text, {'tokens': setup.longest * half, 'accumulated': True}))
    if setup.recomputed_layers < shape.num_layers - 1:
        changes.append(('runtime.activation_checkpointing=True', {'checkpointing': True, 'num_recomputed': None}))
    if setup.bits is None and not setup.full:
        changes.append(('quantization.bits=4', {'bits': 4, 'double_quant': True}))
    if setup.full:
        changes.append(('a lora or qlora config in place of full training', _as_adapter(setup)))
    if not setup.fast and not shape.unsupported_reason:
        changes.append(('runtime.fast=True', {'fast': True}))
    if not setup.paged and setup.optimizer_bytes:
        changes.append(('optimizer.type=bitsandbytes.optim:PagedAdamW8bit', {'paged': True, 'optimizer_spare': 0}))
    length = config.dataset.max_length
    changes.append((f'dataset.max_length={length // 2}', {'tokens': setup.tokens // 2, 'longest': setup.longest // 2}))
    if config.adapter and isinstance(config.adapter.get('r'), int) and config.adapter['r'] >= 16:
        smaller = replace(shape, num_trained=shape.num_trained // 2, ranks=tuple(r // 2 for r in shape.ranks))
        changes.append((f'adapter.r={config.adapter["r"] // 2}', {'shape': smaller}))
    now = predict_memory(setup).on_gpu
    found = [Knob(text, now - predict_memory(replace(setup, **change)).on_gpu) for text, change in changes]
    return sorted((knob for knob in found if knob.saved > least_saved), key=lambda knob: -knob.saved)


def _as_adapter(setup: Setup) -> dict[str, Any]:
    """Full training turned into LoRA with about 2 % of the weights."""
    shape = replace(setup.dims, num_trained=setup.dims.num_base // 50)
    return {'shape': shape, 'bits': None}


@dataclass(frozen=True)
class Estimate:
    """Everything that `xtuner estimate` says.

    Attributes:
        setup: What memory was predicted from.
        memory: The prediction.
        least: The same with all layers computed again, which `auto` falls back to; None where that is `memory`.
        data: None where it is not known.
        plan: None where it is not known.
        checkpoint_bytes: Of one checkpoint.
        num_checkpoints: How many lie on disk at once, at most: those kept and the one being written.
    """

    setup: Setup
    memory: Prediction
    least: Prediction | None
    data: DataSize | None
    plan: TrainingSchedule | None
    checkpoint_bytes: int
    num_checkpoints: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        steps = self.plan.num_steps if self.plan else None
        return {
            'memory': dataclasses.asdict(self.memory) | {
                'allocated': self.memory.allocated, 'on_card': self.memory.on_gpu
            },
            'data': dataclasses.asdict(self.data) if self.data else None,
            'steps': steps,
            'tokens_per_step': self.tokens_per_step,
            'checkpoint_bytes': self.checkpoint_bytes,
            'fast_path': self.setup.dims.unsupported_reason or self.setup.on_fast_path,
        }  # fmt: skip

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of a whole step, or of the only one, rows as full as on average; None where there is no plan."""
        if self.plan is None:
            return None
        return round(self._tokens_per_row * self.plan.largest_step)

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the whole run, as `tokens_per_step`."""
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
        config: A checked config.
        folder: The base model's; only its `config.json` is read.
        data: The size of its data, where that is known.
        world_size: Devices.
        free: Bytes of the GPU before anything is loaded; None: not known.
    """
    shape = shape_of(config, folder)
    setup = setup_of(config, shape, data=data, world_size=world_size, free=free)
    least = setup_of(config, shape, data=data, world_size=world_size)
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
