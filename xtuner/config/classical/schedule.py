"""Translates length, batch size and learning rate: three classical sections become `schedule`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from xtuner.config.classical.section import Section, type_name

_MOST_START = 0.1  # a warm-up starts at the first step's share of the peak
_NEAR = 0.05  # maximum distance of the end of a schedule from the end of the run, as a share of the run


def translate_schedule(
    top: Section, wrapper: Section, loader: Section
) -> tuple[dict[str, Any], Callable[[int, str], int]]:
    """Returns the `schedule` section, and a function that converts a number of iterations into steps."""
    accumulated = wrapper.take('accumulative_counts', 1)
    clip = wrapper.section('clip_grad')
    norm = clip.take('max_norm')
    clip.take('error_if_nonfinite')  # a step without a finite gradient is skipped and counted
    if clip.take('norm_type', 2) != 2:
        clip.fault(f'`{clip.path("norm_type")}` must be 2')
    clip.close()
    wrapper.refuse('all parameters have the same learning rate', 'paramwise_cfg')

    def to_steps(iterations: int, where: str) -> int:
        """Converts a number of micro-batches to optimizer steps, rounded and at least 1; notes a difference."""
        steps = max(1, math.floor(iterations / accumulated + 0.5))
        if accumulated > 1:
            top.findings.note(f'`{where}` counts optimizer steps now: {iterations} iterations are {steps} '
                              f'step{"s" if steps > 1 else ""}')  # fmt: skip
        return steps

    schedule = {
        'batch_size': loader.take('batch_size', 1), 'accumulative_counts': accumulated, 'max_norm': norm,
        **_length(top, accumulated),
    }  # fmt: skip
    return schedule | _learning_rate(top, wrapper, _total(top)), to_steps


def _length(top: Section, accumulated: int) -> dict[str, Any]:
    section = top.section('train_cfg')
    section.type('TrainLoop', 'EpochBasedTrainLoop', 'IterBasedTrainLoop', default='TrainLoop')
    epochs, iterations = section.take('max_epochs'), section.take('max_iters')
    section.take('by_epoch')
    section.take('val_interval')
    section.take('val_begin')
    section.close()
    if (epochs is None) == (iterations is None):
        section.fault('`train_cfg` needs one of `max_epochs` and `max_iters`')
    if iterations is None:
        return {'max_epochs': epochs or 1}
    steps = math.ceil(iterations / accumulated)
    if accumulated > 1:
        top.findings.note(f'`train_cfg.max_iters` = {iterations} iterations are {steps} optimizer steps')
    return {'max_steps': steps}


def _total(top: Section) -> tuple[float, bool]:
    """The length of the run in the unit of its schedulers, and whether the unit is epochs."""
    values = top.take('train_cfg') or {}
    return (values['max_epochs'], True) if values.get('max_epochs') else (values.get('max_iters') or 1, False)


def _learning_rate(top: Section, wrapper: Section, total: tuple[float, bool]) -> dict[str, Any]:
    schedulers = top.take('param_scheduler') or []
    sections = [
        Section(item, f'param_scheduler[{number}]', top.findings)
        for number, item in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else [schedulers])
    ]
    values: dict[str, Any] = {'warmup_ratio': 0.0, 'decay': 'constant', 'min_lr_ratio': 0.0}
    peak = (wrapper.take('optimizer') or {}).get('lr') or 1
    warm_until = 0.0
    if sections and _is_warmup(sections[0]):
        warm_until = _warmup(sections.pop(0), total)
        values['warmup_ratio'] = warm_until / total[0]
    if len(sections) > 1:
        top.fault(f'`param_scheduler` has {len(sections)} parts after the warm-up; only one is supported')
    elif sections:
        values |= _decay(sections[0], total, warm_until, peak)
    return values


def _is_warmup(section: Section) -> bool:
    return type_name(section.take('type')) == 'LinearLR' and section.take('start_factor', 1 / 3) < 1


def _warmup(section: Section, total: tuple[float, bool]) -> float:
    start = section.take('start_factor', 1 / 3)
    if 1e-3 < start <= _MOST_START:
        section.findings.note(f'`{section.path("start_factor")}` = {start:g}: a warm-up starts at 0 now')
    if start > _MOST_START:
        section.fault(f'`{section.path("start_factor")}` must be near 0, because a warm-up starts at 0')
    if section.take('end_factor', 1) != 1 or section.take('begin', 0) != 0:
        section.fault(f'`{section.where}`: a warm-up must start with the run and end at the full learning rate')
    end = section.need('end') or 0
    _unit(section, total)
    section.close()
    return end


def _decay(section: Section, total: tuple[float, bool], warm_until: float, peak: float) -> dict[str, Any]:
    kind = section.type('CosineAnnealingLR', 'LinearLR', 'PolyLR', 'ConstantLR')
    begin, length = section.take('begin', 0), section.take('T_max')
    end = section.take('end') or (begin + length if length else total[0])
    off = abs(end - total[0]) / total[0]
    if kind != 'ConstantLR' and 1e-6 < off <= _NEAR:  # T_max counted from the start of the run, most often
        section.findings.note(f'`{section.where}` ends at {end:g}, the run at {total[0]:g}; now both end together')
    if kind != 'ConstantLR' and not (math.isclose(begin, warm_until) and off <= _NEAR):
        section.fault(f'`{section.where}` goes from {begin} to {end}; it must go from the end of the warm-up '
                      f'({warm_until:g}) to the end of the run ({total[0]:g})')  # fmt: skip
    _unit(section, total)
    floor = section.take('eta_min_ratio') or (section.take('eta_min') or 0) / peak
    if kind == 'CosineAnnealingLR':
        values = {'decay': 'cosine', 'min_lr_ratio': floor}
    elif kind == 'ConstantLR':
        values = {'decay': 'constant'}
        if section.take('factor', 1 / 3) != 1:
            section.fault(f'`{section.path("factor")}` must be 1')
    else:
        if section.take('power', 1) != 1:
            section.fault(f'`{section.path("power")}` must be 1')
        values = {'decay': 'linear', 'min_lr_ratio': floor if kind == 'PolyLR' else section.take('end_factor', 1.0)}
        section.take('start_factor')
    section.close()
    return values


def _unit(section: Section, total: tuple[float, bool]) -> None:
    """Checks that a scheduler has the unit of the run."""
    by_epoch = section.take('by_epoch', True)
    section.take('convert_to_iter_based')
    if by_epoch != total[1]:
        unit = 'epochs' if total[1] else 'iterations'
        section.fault(f'`{section.path("by_epoch")}` is {by_epoch}, but the length of the run is in {unit}')
