"""Supported combinations of method, quantization, strategy, packing, checkpointing, sequence parallelism and objective.

A rule describes an unsupported combination, the reason, and an alternative. `check` runs before anything is loaded. The
table in docs/scale.md is generated from the same rules (`python -m xtuner.config.compatibility` prints it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product

from xtuner.config.schema import TrainConfig
from xtuner.errors import ConfigError

STRATEGIES = ('single', 'ddp', 'fsdp', 'deepspeed_zero1', 'deepspeed_zero2', 'deepspeed_zero3')
METHODS = ('full', 'lora', 'qlora-4bit', 'qlora-8bit', 'other adapter')


@dataclass(frozen=True)
class Combination:
    """The settings of a run that the rules depend on.

    Attributes:
        method: One of `METHODS`; 'other adapter' is anything but plain LoRA.
        strategy: One of `STRATEGIES`.
        packing: 'packed', or 'none': one conversation per row.
        checkpointing: Whether activations are recomputed.
        sequence: Whether packs are distributed over ranks (`parallel.sequence_parallel_size` above 1).
        dtype: 'bf16', 'fp16', 'fp32', or 'auto'.
        fast: `runtime.fast`.
        fp8: `runtime.fp8`.
        optimizer: Name of the optimizer's class.
        with_base: Whether the objective compares the model with its base, without the adapter.
        by_sample: Whether the objective sums over samples.
    """

    method: str
    strategy: str
    packing: str = 'packed'
    checkpointing: bool = True
    sequence: bool = False
    dtype: str = 'auto'
    fast: bool = True
    fp8: bool = False
    optimizer: str = 'AdamW'
    with_base: bool = False
    by_sample: bool = False


@dataclass(frozen=True)
class Rule:
    """An unsupported combination: one for which all of `when` hold.

    Attributes:
        when: Field of `Combination` to the values that the rule applies to.
        why: The reason.
        instead: The alternative.
    """

    when: dict[str, tuple[object, ...]]
    why: str
    instead: str


_SHARDED = ('fsdp', 'deepspeed_zero1', 'deepspeed_zero2', 'deepspeed_zero3')
_ZERO = ('deepspeed_zero1', 'deepspeed_zero2', 'deepspeed_zero3')
# The 8-bit optimizers of bitsandbytes, whose state is quantized in blocks of 256 elements.
_BLOCKWISE = ('Adam8bit', 'AdamW8bit', 'PagedAdam8bit', 'PagedAdamW8bit', 'Lion8bit', 'PagedLion8bit', 'AdEMAMix8bit',
              'PagedAdEMAMix8bit', 'RMSprop8bit', 'SGD8bit', 'LAMB8bit', 'Adagrad8bit')  # fmt: skip
# The update of one element depends on other elements, which are on other ranks.
_WHOLE_TENSOR = ('Adafactor', 'LAMB', 'LAMB32bit', 'LARS', 'LARS32bit', 'PytorchLARS', 'Muon')

RULES = (
    Rule({'method': ('qlora-4bit', 'qlora-8bit'), 'strategy': ('deepspeed_zero3',)},
         'ZeRO-3 shards float weights only; a quantized base would not be sharded',
         '`fsdp`, which shards a 4-bit base, or `deepspeed_zero2`'),
    Rule({'method': ('other adapter',), 'strategy': ('deepspeed_zero3',)},
         'such an adapter reads weights outside the modules that ZeRO-3 gathers; sample generation failed with DoRA',
         'LoRA, `fsdp`, or `deepspeed_zero2`'),
    Rule({'method': ('qlora-8bit',), 'strategy': ('fsdp',)},
         "bitsandbytes' 8-bit layers store their scales with the weight and cannot be sharded",
         '`quantization.bits = 4`, or `ddp`'),
    Rule({'strategy': _SHARDED, 'dtype': ('fp16',)},
         'fp16 uses loss scaling, and ranks with different gradient shards would skip different steps',
         '`model.dtype = "bf16"`, or `ddp`'),
    Rule({'strategy': _SHARDED, 'optimizer': _BLOCKWISE},
         'its quantized state blocks do not align with the shards, so no other strategy could resume from it',
         'the 32-bit version of the optimizer (its state is sharded anyway), or `ddp`'),
    Rule({'strategy': _SHARDED, 'optimizer': _WHOLE_TENSOR},
         'its update needs unsharded tensors', 'AdamW, or `ddp`'),
    Rule({'method': ('full', 'other adapter', 'qlora-8bit'), 'sequence': (True,)},
         'sequence parallelism needs the fused path, which supports plain LoRA on an unquantized or 4-bit base',
         'LoRA or 4-bit QLoRA, or a shorter `dataset.max_length` with `fsdp`'),
    Rule({'strategy': ('fsdp', 'deepspeed_zero3'), 'fp8': (True,)},
         'the scales of FP8 products are computed from unsharded weights', '`runtime.fp8 = False`, or `ddp`'),
    Rule({'fast': (False,), 'sequence': (True,)},
         'sequence parallelism needs the fused path', '`runtime.fast = True`'),
    Rule({'strategy': _ZERO, 'sequence': (True,)},
         'DeepSpeed averages over all ranks as if each held different samples', '`ddp` or `fsdp`'),
    Rule({'strategy': ('single',), 'sequence': (True,)},
         'a single rank cannot distribute a pack', '--nproc-per-node 2 or more, and strategy `ddp` or `fsdp`'),
    Rule({'with_base': (True,), 'method': ('full',)},
         'without an adapter there is no base model to compare with', 'LoRA or QLoRA'),
    Rule({'with_base': (True,), 'strategy': ('fsdp', 'deepspeed_zero3')},
         'the base model needs a forward pass of its own, but sharded weights are gathered for one pass only',
         '`ddp`, or `deepspeed_zero2`'),
    Rule({'with_base': (True,), 'sequence': (True,)},
         'the forward pass of the base model does not support sequence parallelism', 'a shorter `dataset.max_length`'),
    Rule({'by_sample': (True,), 'sequence': (True,)},
         'each rank has only a part of a sample', 'a shorter `dataset.max_length`'),
)  # fmt: skip


def combination_of(
    config: TrainConfig,
    strategy: str,
    *,
    dtype: str | None = None,
    with_base: bool = False,
    by_sample: bool = False,
) -> Combination:
    """A config's combination with a strategy; `dtype` replaces the config's, if given (for `auto`).

    `with_base` and `by_sample` describe the objective, which this package cannot import.
    """
    return Combination(
        method=_method(config),
        strategy=strategy,
        packing='none' if config.dataset.packing == 'none' else 'packed',
        checkpointing=bool(config.runtime.activation_checkpointing),
        sequence=config.parallel.sequence_parallel_size > 1,
        dtype=dtype or config.model.dtype,
        fast=config.runtime.fast,
        fp8=config.runtime.fp8,
        optimizer=_name(config.optimizer['type']),
        with_base=with_base,
        by_sample=by_sample,
    )


def broken_rule(combination: Combination) -> Rule | None:
    """The first rule that a combination violates; None if it is supported."""
    for rule in RULES:
        if all(getattr(combination, name) in values for name, values in rule.when.items()):
            return rule
    return None


def check(combination: Combination) -> None:
    """Raises ConfigError, with the values, the reason and the alternative, for an unsupported combination."""
    rule = broken_rule(combination)
    if rule is not None:
        values = ', '.join(f'{_TEXTS[name]} {_shown(getattr(combination, name))}' for name in rule.when)
        raise ConfigError(f'{values} cannot be combined: {rule.why}; use {rule.instead}')


_TEXTS = {
    'method': 'method', 'strategy': 'strategy', 'packing': 'packing', 'checkpointing': 'activation checkpointing',
    'sequence': 'sequence parallelism', 'dtype': 'model.dtype', 'fast': 'runtime.fast', 'fp8': 'runtime.fp8',
    'optimizer': 'optimizer', 'with_base': 'comparison with the base', 'by_sample': 'sums over samples',
}  # fmt: skip
assert set(_TEXTS) == {field.name for field in fields(Combination)}


def _method(config: TrainConfig) -> str:
    if config.adapter is None:
        return 'full'
    if _name(config.adapter['type']) != 'LoraConfig' or config.adapter.get('use_dora'):
        return 'other adapter'
    return f'qlora-{config.quantization.bits}bit' if config.quantization else 'lora'


def _name(kind: object) -> str:
    """The name of a class, given as the class, as a lazy import of a config, or as text."""
    return str(getattr(kind, '__name__', kind)).rsplit('.', 1)[-1].rsplit(':', 1)[-1]


def _shown(value: object) -> str:
    return {True: 'on', False: 'off'}.get(value, str(value)) if isinstance(value, bool) else f'`{value}`'


def table() -> Iterator[str]:
    """The lines of the table in docs/scale.md, with its footnotes."""
    columns = [*STRATEGIES[1:], 'sequence parallel']
    yield f'| method | {" | ".join(columns)} |'
    yield f'|{" --- |" * (len(columns) + 1)}'
    for method in METHODS:
        cells = [_cell(method, column) for column in columns]
        yield f'| {method} | {" | ".join(cells)} |'
    yield ''
    for number, rule in enumerate(RULES, 1):
        values = ' and '.join(f'{_TEXTS[n]} {" / ".join(map(_shown, v))}' for n, v in rule.when.items())
        yield f'{number}. {values}: {rule.why}. Use {rule.instead}.'


def _cell(method: str, column: str) -> str:
    """'yes' if supported with all values of packing and checkpointing; 'no' with the footnote if with none."""
    sequence = column == 'sequence parallel'
    strategy = 'ddp' if sequence else column
    rules = [
        broken_rule(Combination(method, strategy, packing, checkpointing, sequence))
        for packing, checkpointing in product(('packed', 'none'), (True, False))
    ]
    broken = [rule for rule in rules if rule is not None]
    if not broken:
        return 'yes'
    number = RULES.index(broken[0]) + 1
    return f'no ({number})' if len(broken) == len(rules) else f'in part ({number})'


if __name__ == '__main__':
    print('\n'.join(table()))
