"""Before a model is loaded: whether its training is going to fit the memory that is free on the GPU."""

from __future__ import annotations

import logging

import torch

from xtuner.config.schema import TrainConfig
from xtuner.dataset.stream import PackStream
from xtuner.engine.build import RunInputs
from xtuner.engine.estimate import data_size, is_predicted, knobs, setup_of, shape_of
from xtuner.engine.estimate_text import knob_texts
from xtuner.errors import ModelError, TrainingError, XTunerError
from xtuner.memory.predict import Setup, predict_memory
from xtuner.memory.terms import CONTEXT_BYTES
from xtuner.utils.units import gib

logger = logging.getLogger('xtuner')

# Predictions and measurements differ by less (benchmarks/estimate_h100_*.md): refused beyond, warned of within.
_TOLERANCE = 0.1
_SHOWN_TERMS = 3


def check_memory(
    config: TrainConfig, data: RunInputs, device: torch.device, world_size: int, *, strategy: str = 'single'
) -> None:
    """Compares what the config's least memory is predicted to be with what the GPU has free.

    On a CPU, and where processes share weights or packs among them, nothing is predicted and nothing checked.

    Raises:
        TrainingError: it will not fit; names the largest terms and what to turn.
    """
    if device.type != 'cuda' or not is_predicted(config, strategy):
        return
    free, total = torch.cuda.mem_get_info(device)
    try:
        setup = _setup(config, data, world_size)
        memory = predict_memory(setup)
    except ModelError as error:
        logger.warning('memory is not compared with what is free: %s', error)
        return
    # The process's own context is there already; a paged optimizer's state goes to the host where it must.
    needed = memory.on_gpu - CONTEXT_BYTES - memory.untracked.get('paged optimizer', 0)
    if needed < free * (1 - _TOLERANCE):
        return
    largest = sorted(memory.terms.items(), key=lambda term: -term[1])[:_SHOWN_TERMS]
    message = (
        f'this run is predicted to need {gib(needed)} of {device}, and {gib(free)} of its {gib(total)} are free; '
        f'largest: {", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in largest)}; '
        f'{", or ".join(knob_texts(knobs(config, setup)))}'
    )
    if needed < free * (1 + _TOLERANCE) or not config.runtime.check_memory:
        logger.warning('%s', message)
        return
    raise TrainingError(f'{message}; runtime.check_memory=False tries all the same')


def memory_advice(config: TrainConfig, data: RunInputs, world_size: int) -> list[str]:
    """What to turn where memory has run out after all, the setting that is predicted to save most first."""
    try:
        return knob_texts(knobs(config, _setup(config, data, world_size), least_saved=0))
    except XTunerError:  # what cannot be predicted must not hide that memory has run out
        return []


def _setup(config: TrainConfig, data: RunInputs, world_size: int) -> Setup:
    size = None if isinstance(data.dataset, PackStream) else data_size(data.dataset)
    return setup_of(config, shape_of(config, data.model_folder), data=size, world_size=world_size)
