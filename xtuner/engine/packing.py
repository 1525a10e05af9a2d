"""Switches packing off for a model that would not train the samples of a pack as it trains them alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtuner.config.schema import TrainConfig
from xtuner.engine.checkpoint.run_manifest import recorded_setting
from xtuner.model.families.packing import packing_unsupported_reason

logger = logging.getLogger('xtuner')


def with_supported_packing(config: TrainConfig, model_config: Any, *, checkpoint: Path | None = None) -> TrainConfig:
    """The config with `dataset.packing` 'none' where the model is known to mix the samples of a pack; says so.

    Packing is switched off rather than refused because this is decided from `config.json` alone, before data is
    prepared, cached and planned: the schedule, the cache and the run's manifest all see the value that is used. A model
    that is found to mix samples only after it is loaded is refused instead (`xtuner.objectives.model_checks`), since
    the plan and the prepared packs would have to be made anew by then.

    Args:
        config: A run's config.
        model_config: The base model's transformers config.
        checkpoint: Where a run goes on from; a run that began packed stays packed, as it must to resume exactly.
    """
    packing = config.dataset.packing
    if packing == 'none':
        return config
    reason = packing_unsupported_reason(model_config, config.dataset.max_length)
    if reason is None or (checkpoint is not None and recorded_setting(checkpoint, 'dataset.packing') == packing):
        return config
    logger.warning(
        '`dataset.packing` is %r, and %s: packing is switched off (as with dataset.packing=none), each sample takes a '
        'row of its own',
        packing,
        reason,
    )
    return replace(config, dataset=replace(config.dataset, packing='none'))
