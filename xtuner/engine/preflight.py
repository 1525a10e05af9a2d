"""Checks before a model is loaded whether its training will fit into the free GPU memory."""

from __future__ import annotations

import logging

import torch

from xtuner.config.schema import TrainConfig
from xtuner.dataset.stream import PackStream
from xtuner.engine.build import RunInputs
from xtuner.engine.estimate import data_size, dims_of, is_predicted, memory_savings, setup_of
from xtuner.engine.estimate_text import saving_texts
from xtuner.errors import ModelError, TrainingError, XTunerError
from xtuner.memory.predict import Setup, predict_memory
from xtuner.memory.terms import CONTEXT_BYTES
from xtuner.utils.units import gib

logger = logging.getLogger('xtuner')

# Predictions and measurements differ by less (benchmarks/estimate_h100_*.md): an error beyond, a warning within.
_TOLERANCE = 0.1
_SHOWN_TERMS = 3


def check_memory(
    config: TrainConfig, data: RunInputs, device: torch.device, world_size: int, *, strategy: str = 'single'
) -> None:
    """Compares the predicted minimum memory of a config with the free GPU memory.

    Does nothing on a CPU, or if processes share weights or packs, where there is no prediction.

    Raises:
        TrainingError: The run will not fit; names the largest terms and settings that save memory.
    """
    if device.type != 'cuda' or not is_predicted(config, strategy):
        return
    free, total = torch.cuda.mem_get_info(device)
    try:
        setup = _setup(config, data, world_size)
        memory = predict_memory(setup)
    except ModelError as error:
        logger.warning('memory is not checked: %s', error)
        return
    # The process's own context exists already; a paged optimizer's state can move to the host.
    needed = memory.on_gpu - CONTEXT_BYTES - memory.untracked.get('paged optimizer', 0)
    if needed < free * (1 - _TOLERANCE):
        return
    largest = sorted(memory.terms.items(), key=lambda term: -term[1])[:_SHOWN_TERMS]
    message = (
        f'this run is predicted to need {gib(needed)} of {device}, but only {gib(free)} of its {gib(total)} are free; '
        f'largest: {", ".join(f"{name} {gib(num_bytes)}" for name, num_bytes in largest)}; '
        f'{", or ".join(saving_texts(memory_savings(config, setup)))}'
    )
    if needed < free * (1 + _TOLERANCE) or not config.runtime.check_memory:
        logger.warning('%s', message)
        return
    raise TrainingError(f'{message}; runtime.check_memory=False skips this check')


def memory_advice(config: TrainConfig, data: RunInputs, world_size: int) -> list[str]:
    """Settings to change after running out of memory, the most effective first."""
    try:
        return saving_texts(memory_savings(config, _setup(config, data, world_size), least_saved=0))
    except XTunerError:  # a failed prediction must not hide the out-of-memory error
        return []


def _setup(config: TrainConfig, data: RunInputs, world_size: int) -> Setup:
    size = None if isinstance(data.dataset, PackStream) else data_size(data.dataset)
    return setup_of(config, dims_of(config, data.model_folder), data=size, world_size=world_size)
