"""Everything a config may say: each section, field, default, unit and check, in one place.

A config file is plain Python whose top-level names are the fields of `TrainConfig`. `load.py` turns the file into
these classes, `flatten.py` prints them back with the field's text as a comment, and the error for an unknown key
takes its suggestions from here. This module imports nothing heavy, so that a wrong config fails within a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xtuner.config.arguments import argument_faults
from xtuner.errors import ConfigError

_REQUIRED = object()
_MAX_TOKENS = 2**31  # a micro-batch, padding included
_ALWAYS_ALLOWED_WORKERS = 64  # also on a machine of few cores, where a config for another is only looked at


def option(
    text: str,
    default: Any = _REQUIRED,
    *,
    allowed: Sequence[Any] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its comment, its allowed values, its least and its largest (checked where not None)."""
    metadata = {'text': text, 'allowed': tuple(allowed), 'minimum': minimum, 'maximum': maximum}
    if default is _REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model, its tokenizer and its prompt template: written once, handed to whoever needs them."""

    path: str = option('local folder, Hugging Face id, or modelscope:OWNER/NAME')
    template: str = option('prompt template; from_tokenizer takes the one in the tokenizer', 'from_tokenizer')
    revision: str | None = option('revision of a hub model; None takes the newest', None)
    dtype: str = option(
        'compute dtype; auto: bf16 where the GPU has it, else fp16 with loss scaling, fp32 on CPU',
        'auto',
        allowed=('auto', 'bf16', 'fp16', 'fp32'),
    )
    attention: str = option('attention implementation', 'auto', allowed=('auto', 'sdpa', 'eager', 'flash_attention_2'))
    trust_remote_code: bool = option('run code that comes with the model; never needed for InternLM', False)


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the frozen base is held in memory (QLoRA, arXiv:2305.14314)."""

    bits: int = option('bits a frozen weight', 4, allowed=(4, 8))
    quant_type: str = option('4-bit data type', 'nf4', allowed=('nf4', 'fp4'))
    double_quant: bool = option('quantise the 4-bit scales as well', True)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where the conversations come from and how they become token ids."""

    source: Any = option('file, folder, hub id, modelscope:OWNER/NAME, dict(path=..., weight=...), or a list of these')
    map_fn: Any = option('map function: a registered name, a function, or module:function; None detects it', None)
    max_length: int = option('tokens a pack', 2048, minimum=2, maximum=2**24)
    on_long: str = option(
        'a conversation longer than max_length: truncate cuts its end, truncate_left its beginning',
        'truncate', allowed=('error', 'drop', 'truncate', 'truncate_left'))  # fmt: skip
    on_bad_record: str = option('a record that cannot be used: stop, or leave it out and count it',
                                'error', allowed=('error', 'skip'))  # fmt: skip
    max_dropped: float = option(
        'share of the conversations that may be lost before preparation fails',
        0.2, minimum=0, maximum=1)  # fmt: skip
    train_on: str = option('what is trained: assistant (all answers), last_turn (the last one), all (prompts too)',
                           'assistant', allowed=('assistant', 'last_turn', 'all'))  # fmt: skip
    packing: str = option('how conversations share packs; none: a pack each',
                          'best_fit', allowed=('best_fit', 'first_fit', 'stream', 'none'))  # fmt: skip
    streaming: bool = option('read and pack while training, without a cache; needs schedule.max_steps', False)
    group_by_length: bool = option('batches of similar length; for packing none', False)
    val_ratio: float = option('share of the conversations kept for validation', 0.0, minimum=0)
    val_file: Any = option('validation data: whatever source may be; None: none beside val_ratio', None)
    unique_id: str | None = option('field that must differ between records that have it; None: not checked', 'id')
    ignore: list[str] = option(
        'fields of records and messages to leave out, such as system or reasoning_content; unused ones are an error '
        'where they would change what is learnt', [])  # fmt: skip
    special_tokens_in_answers: bool | list[str] | None = option(
        'special tokens that answers spell, such as those around tool calls, become ids: True means all but those of '
        'the template, or a list; None trains them as text', None)  # fmt: skip
    cache_dir: str | None = option('where prepared data is kept; None: XTUNER_CACHE, else ~/.cache/xtuner', None)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long, how much at a time, and how the learning rate moves."""

    max_epochs: float = option('passes over the data', 3, minimum=0, maximum=10**6)
    max_steps: int | None = option('optimizer steps; None: as max_epochs says', None, minimum=1, maximum=10**9)
    batch_size: int = option('packs (or samples) a device and micro-batch', 1, minimum=1, maximum=2**16)
    accumulative_counts: int = option('micro-batches an optimizer step', 16, minimum=1, maximum=2**16)
    warmup_ratio: float = option(
        'share of the steps in which the learning rate rises from 0',
        0.03, minimum=0, maximum=1)  # fmt: skip
    decay: str = option('what follows the warm-up', 'cosine', allowed=('cosine', 'linear', 'constant'))
    min_lr_ratio: float = option(
        'learning rate at the end, as a share of its peak',
        0.0, minimum=0, maximum=1)  # fmt: skip
    max_norm: float | None = option('clip the gradient to this L2 norm; None: never', 1.0, minimum=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the adapter is written and how many are kept."""

    interval: int = option('optimizer steps between two checkpoints; the last step is always saved', 100, minimum=1)
    max_keep: int = option('how many checkpoints are kept; -1: all', 2, minimum=-1)
    keep_best: bool = option('keep the one of the lowest validation loss too; `best` names it', True)

    def __post_init__(self) -> None:
        if self.max_keep == 0:
            raise ConfigError('`checkpoint.max_keep` must be 1 or more, or -1 to keep all; got 0')


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported while training. `metrics.jsonl` is always written."""

    interval: int = option('optimizer steps between two log lines', 1, minimum=1)
    trackers: list[str] = option('further places for the metrics', ['tensorboard'], allowed=('tensorboard', 'wandb'))


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Prompts answered before, during and after training, for a person to read. They never change the run."""

    prompts: list[str] | None = option('the prompts; []: no samples; None: the first ones of the training data', None)
    system: str = option('system message of each', '')
    interval: int = option('optimizer steps between two rounds', 100, minimum=1)
    max_new_tokens: int = option('tokens an answer may have', 100, minimum=1, maximum=2**20)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """The rest: seed, memory and speed."""

    seed: int = option('seed of data order, adapter initialisation and dropout', 42, minimum=0, maximum=2**32 - 1)
    activation_checkpointing: bool | str = option(
        'True keeps one activation a layer and computes the rest again in the backward pass: slower, least memory; '
        'auto does so for as few layers as the free memory allows (for all of them off the fast path)',
        'auto',
        allowed=(True, False, 'auto'),
    )
    num_workers: int = option('processes that read batches', 0, minimum=0)
    max_nonfinite_steps: int = option('stop after so many steps in a row without a finite gradient', 10, minimum=1)
    fast: bool = option('use the fused training path where model and device allow it', True)
    check_memory: bool = option('refuse a run that is predicted not to fit the free memory of the GPU', True)
    fp8: bool = option('multiply frozen weights in FP8: faster on GPUs that have it, coarser; see docs/speed.md', False)

    def __post_init__(self) -> None:
        cores = os.cpu_count() or 1
        if self.num_workers > (most := max(_ALWAYS_ALLOWED_WORKERS, 4 * cores)):
            raise ConfigError(f'`runtime.num_workers` must be at most {most} on this machine of {cores} cores, got '
                              f'{self.num_workers}')  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run spreads over several devices (docs/scale.md)."""

    strategy: str = option(
        'auto (single for one process, ddp for several), single, ddp, fsdp, deepspeed_zero1, deepspeed_zero2, '
        'deepspeed_zero2_offload, deepspeed_zero3, or a DeepSpeed .json', 'auto')  # fmt: skip
    sequence_parallel_size: int = option(
        'devices that share each pack, for packs too long for one', 1, minimum=1, maximum=2**16)  # fmt: skip
    timeout_s: float = option(
        'seconds without progress after which a rank has hung', 1800, minimum=1, maximum=10**8)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. The fields are the top-level names of a config file."""

    model: ModelConfig = option('the base model')
    dataset: DatasetConfig = option('the conversations')
    optimizer: dict[str, Any] = option('the optimizer: type and its own arguments')
    objective: str | dict[str, Any] = option(
        'what is minimised: sft, "file.py:function", or a dict of type and its arguments (docs/objectives.md)', 'sft'
    )
    quantization: QuantizationConfig | None = option('None: the base stays in its own precision', None)
    adapter: dict[str, Any] | None = option('a peft config: type and its arguments; None trains all weights', None)
    schedule: ScheduleConfig = option('steps, batches and learning rate', ScheduleConfig())
    checkpoint: CheckpointConfig = option('checkpoints', CheckpointConfig())
    log: LogConfig = option('logging', LogConfig())
    samples: SamplesConfig = option('sample generation', SamplesConfig())
    runtime: RuntimeConfig = option('seed, memory and speed', RuntimeConfig())
    parallel: ParallelConfig = option('several devices', ParallelConfig())
    hooks: list[dict[str, Any]] = option('further mmengine hooks: type and its arguments', [])

    def __post_init__(self) -> None:
        if self.quantization is not None and self.adapter is None:
            raise ConfigError(
                '`quantization` needs an `adapter`: quantised weights cannot be trained; '
                'set `adapter = dict(type=LoraConfig, ...)` or `quantization = None`'
            )
        tokens = self.schedule.batch_size * self.dataset.max_length
        if tokens > _MAX_TOKENS:
            raise ConfigError(
                f'`schedule.batch_size` x `dataset.max_length` is {tokens:,} tokens a micro-batch, and may be '
                f'{_MAX_TOKENS:,} at most; `schedule.accumulative_counts` makes steps larger'
            )
        # torch and peft look at them once data and model are there
        faults = [*argument_faults(self.optimizer, 'optimizer'), *argument_faults(self.adapter, 'adapter')]
        if isinstance(self.objective, dict):
            faults += argument_faults(self.objective, 'objective')
        if faults:
            raise ConfigError('; '.join(faults))


# Comments for the arguments of the open sections that users change most.
ARGUMENT_TEXTS = {
    'type': 'AdamW, LoraConfig or the like, or any class or function; the other keys are its arguments',
    'objective.type': 'sft, "file.py:name" or "module:name"; the other keys are its arguments',
    'objective.needs': 'which values of each target token the function gets',
    'objective.no_grad': 'those of them that are not differentiated by',
    'lr': 'peak learning rate',
    'betas': 'decay of the two moments',
    'weight_decay': 'decoupled weight decay',
    'r': 'rank of the adapter, typically 8 to 64',
    'lora_alpha': 'the adapter counts lora_alpha / r',
    'lora_dropout': 'share of adapter inputs dropped in training',
    'target_modules': 'all-linear: every linear layer of the blocks; or a list of names',
}
