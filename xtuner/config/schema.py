"""The config schema: each section, field, default, unit and check, in one place.

A config file is plain Python whose top-level names are the fields of `TrainConfig`. `load.py` turns the file into these
classes, `flatten.py` prints them with the text of each field as a comment, and the error for an unknown key suggests
names from here. This module imports no heavy library, so that an invalid config fails within a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from xtuner.config.arguments import argument_faults
from xtuner.errors import ConfigError

_REQUIRED = object()
_MAX_TOKENS = 2**31  # of a micro-batch, padding included
_ALWAYS_ALLOWED_WORKERS = 64  # even on a machine with few cores, where a config for another may only be inspected


def option(
    text: str,
    default: Any = _REQUIRED,
    *,
    allowed: Sequence[Any] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with its description, allowed values, minimum and maximum (not checked if None)."""
    metadata = {'text': text, 'allowed': tuple(allowed), 'minimum': minimum, 'maximum': maximum}
    if default is _REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model, its tokenizer and its prompt template, which all other sections share."""

    path: str = option('local folder, Hugging Face id, or modelscope:OWNER/NAME')
    template: str = option('prompt template; from_tokenizer uses that of the tokenizer', 'from_tokenizer')
    revision: str | None = option('revision of a hub model; None: the newest', None)
    dtype: str = option(
        'compute dtype; auto: bf16 if the GPU supports it, else fp16 with loss scaling; fp32 on a CPU',
        'auto',
        allowed=('auto', 'bf16', 'fp16', 'fp32'),
    )
    attention: str = option('attention implementation', 'auto', allowed=('auto', 'sdpa', 'eager', 'flash_attention_2'))
    trust_remote_code: bool = option('allow code that comes with the model; not needed for InternLM', False)


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """Quantization of the frozen base model (QLoRA, arXiv:2305.14314)."""

    bits: int = option('bits per frozen weight', 4, allowed=(4, 8))
    quant_type: str = option('4-bit data type', 'nf4', allowed=('nf4', 'fp4'))
    double_quant: bool = option('quantize the 4-bit scales as well', True)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The sources of the conversations, and how they are encoded and packed."""

    source: Any = option('file, folder, hub id, modelscope:OWNER/NAME, dict(path=..., weight=...), or a list of these')
    map_fn: Any = option('map function: a registered name, a function, or module:function; None: detected', None)
    max_length: int = option('tokens per pack', 2048, minimum=2, maximum=2**24)
    on_long: str = option(
        'conversations longer than max_length: truncate cuts the end, truncate_left the beginning',
        'truncate', allowed=('error', 'drop', 'truncate', 'truncate_left'))  # fmt: skip
    on_bad_record: str = option('unusable records: error stops, skip skips and counts them',
                                'error', allowed=('error', 'skip'))  # fmt: skip
    max_dropped: float = option(
        'maximum share of conversations that may be dropped; above it, preparation fails',
        0.2, minimum=0, maximum=1)  # fmt: skip
    train_on: str = option('training targets: assistant (all answers), last_turn (the last one), all (prompts too)',
                           'assistant', allowed=('assistant', 'last_turn', 'all'))  # fmt: skip
    packing: str = option('packing of conversations; none: one row per conversation',
                          'best_fit', allowed=('best_fit', 'first_fit', 'stream', 'none'))  # fmt: skip
    streaming: bool = option('read and pack during training, without a cache; needs schedule.max_steps', False)
    group_by_length: bool = option('batch samples of similar length; only with packing none', False)
    val_ratio: float = option('share of the conversations held out for validation', 0.0, minimum=0)
    val_file: Any = option('validation data, with the values of source; None: only val_ratio', None)
    unique_id: str | None = option('field that must be unique among the records that have it; None: not checked', 'id')
    ignore: list[str] = option(
        'fields of records and messages to ignore, such as system or reasoning_content; other unread fields are an '
        'error if they would change what the model learns', [])  # fmt: skip
    special_tokens_in_answers: bool | list[str] | None = option(
        'special tokens spelled in answers, such as tool call markers, to train as tokens: True for all but those of '
        'the template, or a list; None trains them as text', None)  # fmt: skip
    cache_dir: str | None = option('cache for prepared data; None: XTUNER_CACHE, else ~/.cache/xtuner', None)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Length of the run, batch size, and learning rate schedule."""

    max_epochs: float = option('epochs', 3, minimum=0, maximum=10**6)
    max_steps: int | None = option('optimizer steps; None: determined by max_epochs', None, minimum=1, maximum=10**9)
    batch_size: int = option('packs (or samples) per device and micro-batch', 1, minimum=1, maximum=2**16)
    accumulative_counts: int = option(
        'micro-batches per optimizer step (gradient accumulation)', 16, minimum=1, maximum=2**16
    )
    warmup_ratio: float = option(
        'share of the steps in which the learning rate rises from 0',
        0.03, minimum=0, maximum=1)  # fmt: skip
    decay: str = option('learning rate decay after the warm-up', 'cosine', allowed=('cosine', 'linear', 'constant'))
    min_lr_ratio: float = option(
        'final learning rate, as a share of the peak',
        0.0, minimum=0, maximum=1)  # fmt: skip
    max_norm: float | None = option('clip the gradient to this L2 norm; None: no clipping', 1.0, minimum=0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Interval and number of checkpoints."""

    interval: int = option('optimizer steps between checkpoints; the last step is always saved', 100, minimum=1)
    max_keep: int = option('number of checkpoints to keep; -1: all', 2, minimum=-1)
    keep_best: bool = option(
        'also keep the checkpoint with the lowest validation loss; the file best has its name', True
    )

    def __post_init__(self) -> None:
        if self.max_keep == 0:
            raise ConfigError('`checkpoint.max_keep` must be 1 or more, or -1 to keep all; got 0')


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging during training. `metrics.jsonl` is always written."""

    interval: int = option('optimizer steps between log lines', 1, minimum=1)
    trackers: list[str] = option(
        'experiment trackers for the metrics', ['tensorboard'], allowed=('tensorboard', 'wandb')
    )


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Prompts answered before, during and after training, for inspection. They do not affect the run."""

    prompts: list[str] | None = option(
        'the prompts; []: no samples; None: the first prompts of the training data', None
    )
    system: str = option('system message of the prompts', '')
    interval: int = option('optimizer steps between rounds of samples', 100, minimum=1)
    max_new_tokens: int = option('maximum tokens per answer', 100, minimum=1, maximum=2**20)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Seed, memory and speed."""

    seed: int = option(
        'random seed of data order, adapter initialization and dropout', 42, minimum=0, maximum=2**32 - 1
    )
    activation_checkpointing: bool | str = option(
        'True saves one activation per layer and recomputes the rest in the backward pass: slower, least memory; '
        'auto recomputes as few layers as the free memory allows (without the fused path, all of them)',
        'auto',
        allowed=(True, False, 'auto'),
    )
    num_workers: int = option('data loading processes', 0, minimum=0)
    max_nonfinite_steps: int = option('stop after this many consecutive steps without a finite gradient', 10, minimum=1)
    fast: bool = option('use the fused training path if model and device support it', True)
    check_memory: bool = option('refuse a run that is predicted to exceed the free memory of the GPU', True)
    fp8: bool = option(
        'FP8 matrix products with frozen weights: faster on GPUs with FP8, less exact; see docs/speed.md', False
    )

    def __post_init__(self) -> None:
        cores = os.cpu_count() or 1
        if self.num_workers > (most := max(_ALWAYS_ALLOWED_WORKERS, 4 * cores)):
            raise ConfigError(f'`runtime.num_workers` must be at most {most} on this machine of {cores} cores, got '
                              f'{self.num_workers}')  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Distribution of a run over several devices (docs/scale.md)."""

    strategy: str = option(
        'auto (single for one process, ddp for several), single, ddp, fsdp, deepspeed_zero1, deepspeed_zero2, '
        'deepspeed_zero2_offload, deepspeed_zero3, or a DeepSpeed .json', 'auto')  # fmt: skip
    sequence_parallel_size: int = option(
        'devices over which to distribute each pack, for long packs', 1, minimum=1, maximum=2**16)  # fmt: skip
    timeout_s: float = option(
        'seconds without progress after which a rank counts as hung', 1800, minimum=1, maximum=10**8)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The config of a run. Its fields are the top-level names of a config file."""

    model: ModelConfig = option('the base model')
    dataset: DatasetConfig = option('the conversations')
    optimizer: dict[str, Any] = option('the optimizer: type and its arguments')
    objective: str | dict[str, Any] = option(
        'the training loss: sft, "file.py:function", or a dict of type and its arguments (docs/objectives.md)', 'sft'
    )
    quantization: QuantizationConfig | None = option('quantization of the base; None: unquantized', None)
    adapter: dict[str, Any] | None = option('a peft config: type and its arguments; None: full fine-tuning', None)
    schedule: ScheduleConfig = option('steps, batches and learning rate', ScheduleConfig())
    checkpoint: CheckpointConfig = option('checkpoints', CheckpointConfig())
    log: LogConfig = option('logging', LogConfig())
    samples: SamplesConfig = option('sample generation', SamplesConfig())
    runtime: RuntimeConfig = option('seed, memory and speed', RuntimeConfig())
    parallel: ParallelConfig = option('several devices', ParallelConfig())
    hooks: list[dict[str, Any]] = option('more mmengine hooks: type and its arguments', [])

    def __post_init__(self) -> None:
        if self.quantization is not None and self.adapter is None:
            raise ConfigError(
                '`quantization` needs an `adapter`, because quantized weights cannot be trained; '
                'set `adapter = dict(type=LoraConfig, ...)` or `quantization = None`'
            )
        tokens = self.schedule.batch_size * self.dataset.max_length
        if tokens > _MAX_TOKENS:
            raise ConfigError(
                f'`schedule.batch_size` x `dataset.max_length` is {tokens:,} tokens per micro-batch, at most '
                f'{_MAX_TOKENS:,} are allowed; for larger steps, increase `schedule.accumulative_counts`'
            )
        # torch and peft check them only after data and model are loaded
        faults = [*argument_faults(self.optimizer, 'optimizer'), *argument_faults(self.adapter, 'adapter')]
        if isinstance(self.objective, dict):
            faults += argument_faults(self.objective, 'objective')
        if faults:
            raise ConfigError('; '.join(faults))


# Comments for the most common arguments of the open sections.
ARGUMENT_TEXTS = {
    'type': 'AdamW, LoraConfig or the like, or any class or function; the other keys are its arguments',
    'objective.type': 'sft, "file.py:name" or "module:name"; the other keys are its arguments',
    'objective.needs': 'values per target token that the function receives',
    'objective.no_grad': 'those of them without gradient',
    'lr': 'peak learning rate',
    'betas': 'decay rates of the two moments',
    'weight_decay': 'decoupled weight decay',
    'r': 'rank of the adapter, typically 8 to 64',
    'lora_alpha': 'the adapter is scaled by lora_alpha / r',
    'lora_dropout': 'dropout of adapter inputs in training',
    'target_modules': 'all-linear: every linear layer of the blocks; or a list of names',
}
