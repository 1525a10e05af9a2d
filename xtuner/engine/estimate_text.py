"""Formats an estimate as the text that `xtuner estimate` prints."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner.config.schema import TrainConfig
from xtuner.engine.estimate import Estimate, MemorySaving, is_predicted, memory_savings
from xtuner.engine.schedule import few_steps_note
from xtuner.memory.gpus import GPUS, GpuSpec, tokens_per_second
from xtuner.memory.predict import Prediction, Setup
from xtuner.utils.units import GIB, compact, counted, duration, gib

_WIDTH = 17
_MAX_SAVINGS = 3


def describe(
    config: TrainConfig, estimate: Estimate, *, card: GpuSpec | None = None, step_seconds: float | None = None
) -> list[str]:
    """Returns the lines of an estimate.

    Args:
        config: The estimated config.
        estimate: The estimate.
        card: The GPU that it is for, if known.
        step_seconds: Measured time of an optimizer step, used instead of an estimate.
    """
    setup = estimate.setup
    lines = [*_model(config, setup), '', *_memory(estimate.memory, setup)]
    if estimate.least is not None and estimate.least.on_gpu < estimate.memory.on_gpu:
        layers = f'recomputing {setup.recomputed_layers} of {setup.dims.num_layers} layers'
        lines.append(f'With the memory available: {layers}; recomputing all of them: {gib(estimate.least.on_gpu)}.')
    least = estimate.least or estimate.memory
    lines += _fit(config, setup, estimate.memory, least, card)
    lines += ['', *_run(config, estimate), *_time(estimate, card, step_seconds)]
    if not is_predicted(config, config.parallel.strategy):
        lines.append('Sharding across processes (`parallel`) is not predicted: each process needs less than this.')
    lines += ['', 'Memory is predicted for a GPU only; the rest also holds for a run on a CPU.']
    return lines


def _model(config: TrainConfig, setup: Setup) -> list[str]:
    dims = setup.dims
    share = dims.num_trained / (dims.num_base + (0 if setup.full else dims.num_trained))
    precision = f'in {config.quantization.bits} bit' if config.quantization else 'in half precision'
    path = (
        'fused path' if setup.on_fast_path else f'fused path disabled: {dims.unsupported_reason or "set in the config"}'
    )
    return [
        f'{config.model.path}: {compact(dims.num_base)} parameters '
        f'{"in float32" if setup.full or (setup.value_bytes == 4 and not config.quantization) else precision}, '
        f'{compact(dims.num_trained)} trained ({share:.2%}); {path}',
        f'a micro-batch of {setup.tokens // setup.longest} x {setup.longest} tokens'
        + (f', {setup.target_share:.0%} of them trained' if setup.target_share < 1 else ''),
    ]


def _memory(memory: Prediction, setup: Setup) -> list[str]:
    texts = {
        'base': 'frozen weights' if not setup.full else 'weights, all trained',
        'adapter': 'trained weights, float32',
        'activations': 'kept by the forward pass for the backward pass',
        'workspace': "one layer's dequantized weights and temporaries",
        'loss': 'logits of a slice of tokens',
        'libraries': 'cuBLAS workspace',
        'graphs': 'memory of recorded CUDA graphs',
        'recorded graphs': 'kept for CUDA graphs',
        'paged optimizer': 'may be paged out to the host',
        'fragments': "fragmentation of torch's allocator",
        'CUDA': 'context and kernels, measured on an H100',
    }
    lines = [f'{"peak memory":{_WIDTH}}{"GiB":>8}   peak at {memory.phase}']
    lines += _rows(memory.terms, texts)
    lines += [f'{"counted by torch":{_WIDTH}}{memory.allocated / GIB:8.2f}', *_rows(memory.untracked, texts)]
    lines.append(f'{"on the GPU":{_WIDTH}}{memory.on_gpu / GIB:8.2f}')
    if memory.host:
        terms = ', '.join(f'{name} {gib(size)}' for name, size in memory.host.items())
        lines.append(f'{"pinned on host":{_WIDTH}}{sum(memory.host.values()) / GIB:8.2f}   {terms}')
    return lines


def _rows(terms: Mapping[str, int], texts: Mapping[str, str]) -> list[str]:
    return [f'  {name:{_WIDTH - 2}}{size / GIB:8.2f}   {texts.get(name, "")}'.rstrip() for name, size in terms.items()]


def _fit(config: TrainConfig, setup: Setup, memory: Prediction, least: Prediction, card: GpuSpec | None) -> list[str]:
    """Whether the run fits the GPU, or which GPUs it fits; settings that save memory if it does not."""
    if card is None:
        fitting = [name for name, gpu in GPUS.items() if least.on_gpu <= gpu.num_bytes]
        return [f'Fits: {", ".join(fitting) if fitting else "none of the known GPUs"}.']
    if memory.on_gpu <= card.num_bytes:
        return [f'Fits {card.name}: {gib(card.num_bytes - memory.on_gpu)} of {card.gib:.1f} GiB stay free.']
    return [
        f'Does not fit {card.name}: {gib(memory.on_gpu - card.num_bytes)} more than its {card.gib:.1f} GiB.',
        *(f'  {text}' for text in saving_texts(memory_savings(config, setup))),
    ]


def saving_texts(savings: list[MemorySaving]) -> list[str]:
    """Describes the settings that save most memory."""
    return [f'{saving.text} saves {gib(saving.saved)}' for saving in savings[:_MAX_SAVINGS]]


def _run(config: TrainConfig, estimate: Estimate) -> list[str]:
    lines = []
    if estimate.data is not None:
        data = estimate.data
        lines.append(
            f'data: {data.num_tokens:,} tokens in {counted(data.num_items, "row")}, '
            f'{data.target_share:.1%} of them trained'
        )
    if estimate.plan is not None:
        schedule, plan = config.schedule, estimate.plan
        rest = f', the last of {plan.items_of_last_step}' if plan.items_of_last_step < plan.largest_step else ''
        tokens = f'{estimate.tokens_per_step:,} tokens{"" if plan.num_steps == 1 else " each"}'
        epochs = '' if schedule.max_steps else f', {schedule.max_epochs:g} epochs'
        rows = counted(plan.largest_step, 'row')
        lines.append(f'run: {counted(plan.num_steps, "step")} of {rows}{rest}, about {tokens}{epochs}')
        if note := few_steps_note(plan, estimate.data.num_samples if estimate.data else None):
            lines.append(f'     {note}')
    else:
        lines.append('run: the number of steps is unknown without the data or schedule.max_steps')
    size = gib(estimate.checkpoint_bytes)
    if estimate.num_checkpoints:
        total = gib(estimate.num_checkpoints * estimate.checkpoint_bytes)
        lines.append(f'disk: {size} per checkpoint, at most {estimate.num_checkpoints} at once: {total}')
    else:
        lines.append(f'disk: {size} per checkpoint, all are kept')
    return lines


def _time(estimate: Estimate, card: GpuSpec | None, step_seconds: float | None) -> list[str]:
    if estimate.plan is None:
        return []
    steps = estimate.plan.num_steps
    if step_seconds is not None:
        return [f'time: {duration(steps * step_seconds)} at {step_seconds:g} s per step']
    if card is None or not card.tflops:
        return ['time: unknown; set --gpu, or --step-seconds from the first steps of the run']
    world = estimate.plan.world_size
    speed = tokens_per_second(estimate.setup, card) * world
    seconds = (estimate.num_tokens or 0) / speed
    on = f'{world} x {card.name}' if world > 1 else card.name
    if seconds < 60:
        return [f'time: less than a minute of computation on {on}; loading, samples and checkpoints take longer']
    return [
        f'time: about {duration(seconds)} on {on}, at {speed:,.0f} tokens/s; '
        'assuming the utilization measured on an H200'
    ]
