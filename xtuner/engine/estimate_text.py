"""An estimate in words: what `xtuner estimate` prints."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner.config.schema import TrainConfig
from xtuner.engine.estimate import Estimate, Knob, is_predicted, knobs
from xtuner.engine.schedule import few_steps_note
from xtuner.memory.gpus import GPUS, GpuSpec, tokens_per_second
from xtuner.memory.predict import Prediction, Setup
from xtuner.utils.units import GIB, compact, counted, duration, gib

_WIDTH = 17
_MOST_KNOBS = 3


def describe(
    config: TrainConfig, estimate: Estimate, *, card: GpuSpec | None = None, step_seconds: float | None = None
) -> list[str]:
    """The lines of an estimate.

    Args:
        config: What was estimated.
        estimate: Its numbers.
        card: The GPU that it is for, where one is known.
        step_seconds: A measured time of an optimizer step, in place of arithmetic.
    """
    setup = estimate.setup
    lines = [*_model(config, setup), '', *_memory(estimate.memory, setup)]
    if estimate.least is not None and estimate.least.on_card < estimate.memory.on_card:
        again = f'{setup.recomputed_layers} of {setup.shape.num_layers} layers computed twice'
        lines.append(f'As the memory allows, {again}; with all of them {gib(estimate.least.on_card)}.')
    least = estimate.least or estimate.memory
    lines += _fit(config, setup, estimate.memory, least, card)
    lines += ['', *_run(config, estimate), *_time(estimate, card, step_seconds)]
    if not is_predicted(config, config.parallel.strategy):
        lines.append('What the processes share among them (`parallel`) is not predicted: each needs less than this.')
    lines += ['', 'The memory is that of a GPU; for a run on a CPU it is not predicted, the rest holds.']
    return lines


def _model(config: TrainConfig, setup: Setup) -> list[str]:
    shape = setup.shape
    share = shape.num_trained / (shape.num_base + (0 if setup.full else shape.num_trained))
    held = f'in {config.quantization.bits} bit' if config.quantization else 'in half precision'
    path = (
        'the fast path' if setup.on_fast_path else f'the stock path: {shape.unsupported_reason or "as the config says"}'
    )
    return [
        f'{config.model.path}: {compact(shape.num_base)} parameters '
        f'{"in float32" if setup.full or (setup.value_bytes == 4 and not config.quantization) else held}, '
        f'{compact(shape.num_trained)} trained ({share:.2%}); on {path}',
        f'a micro-batch of {setup.tokens // setup.longest} x {setup.longest} tokens'
        + (f', {setup.target_share:.0%} of them trained' if setup.target_share < 1 else ''),
    ]


def _memory(memory: Prediction, setup: Setup) -> list[str]:
    texts = {
        'base': 'frozen weights' if not setup.full else 'weights, all trained',
        'adapter': 'trained weights, float32',
        'activations': 'what the backward pass needs of the forward pass',
        'workspace': "one layer's weights as floats, and what passes",
        'loss': 'logits of a slice of the tokens',
        'libraries': "cuBLAS's own",
        'graphs': 'memory of recorded CUDA graphs',
        'recorded graphs': 'kept for CUDA graphs',
        'paged optimizer': 'may move to the host when memory is short',
        'fragments': "pieces that torch's allocator cannot use",
        'CUDA': 'context and kernels, measured on an H100',
    }
    lines = [f'{"peak memory":{_WIDTH}}{"GiB":>8}   highest at {memory.moment}']
    lines += _rows(memory.terms, texts)
    lines += [f'{"counted by torch":{_WIDTH}}{memory.allocated / GIB:8.2f}', *_rows(memory.beside, texts)]
    lines.append(f'{"on the card":{_WIDTH}}{memory.on_card / GIB:8.2f}')
    if memory.host:
        terms = ', '.join(f'{name} {gib(size)}' for name, size in memory.host.items())
        lines.append(f'{"pinned on host":{_WIDTH}}{sum(memory.host.values()) / GIB:8.2f}   {terms}')
    return lines


def _rows(terms: Mapping[str, int], texts: Mapping[str, str]) -> list[str]:
    return [f'  {name:{_WIDTH - 2}}{size / GIB:8.2f}   {texts.get(name, "")}'.rstrip() for name, size in terms.items()]


def _fit(config: TrainConfig, setup: Setup, memory: Prediction, least: Prediction, card: GpuSpec | None) -> list[str]:
    """Whether it fits the card, or which cards it fits; what to turn where it does not."""
    if card is None:
        fitting = [name for name, known in GPUS.items() if least.on_card <= known.num_bytes]
        return [f'Fits: {", ".join(fitting) if fitting else "none of the known cards"}.']
    if memory.on_card <= card.num_bytes:
        return [f'Fits {card.name}: {gib(card.num_bytes - memory.on_card)} of {card.gib:.1f} GiB stay free.']
    return [
        f'Does not fit {card.name}: {gib(memory.on_card - card.num_bytes)} more than its {card.gib:.1f} GiB.',
        *(f'  {text}' for text in knob_texts(knobs(config, setup))),
    ]


def knob_texts(found: list[Knob]) -> list[str]:
    """What the settings that save most would save."""
    return [f'{knob.text} saves {gib(knob.saved)}' for knob in found[:_MOST_KNOBS]]


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
        lines.append('run: the number of steps is not known without the data or schedule.max_steps')
    size = gib(estimate.checkpoint_bytes)
    if estimate.num_checkpoints:
        total = gib(estimate.num_checkpoints * estimate.checkpoint_bytes)
        lines.append(f'disk: {size} a checkpoint, at most {estimate.num_checkpoints} at once: {total}')
    else:
        lines.append(f'disk: {size} a checkpoint, all are kept')
    return lines


def _time(estimate: Estimate, card: GpuSpec | None, step_seconds: float | None) -> list[str]:
    if estimate.plan is None:
        return []
    steps = estimate.plan.num_steps
    if step_seconds is not None:
        return [f'time: {duration(steps * step_seconds)} at {step_seconds:g} s a step']
    if card is None or not card.tflops:
        return ['time: not known; give --gpu CARD, or --step-seconds from the first steps of the run']
    world = estimate.plan.world_size
    speed = tokens_per_second(estimate.setup, card) * world
    seconds = (estimate.num_tokens or 0) / speed
    on = f'{world} x {card.name}' if world > 1 else card.name
    if seconds < 60:
        return [f'time: below a minute of computing on {on}; loading, samples and checkpoints take longer']
    return [
        f'time: about {duration(seconds)} on {on}, at {speed:,.0f} tokens/s; the share of the peak is the one '
        'measured on an H200'
    ]
