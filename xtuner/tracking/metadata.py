"""Run metadata as JSON values: method, data and latest losses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xtuner.config.schema import TrainConfig
from xtuner.dataset.cache.store import PreparedDataset
from xtuner.registry import reference
from xtuner.tracking.files import METRICS_FILE
from xtuner.tracking.model_card import public_name
from xtuner.utils.jsonl import objects

_BINS = 24
_TAIL_BYTES = 2**16  # bytes read from the end of the metrics, enough for the last steps


def method_of(config: TrainConfig) -> str:
    """Describes the training method: 'QLoRA, rank 64', 'LoRA, rank 8', 'all weights', or another adapter's name."""
    if config.adapter is None:
        return 'all weights'
    kind = reference(config.adapter['type']).partition(':')[2].removesuffix('Config')
    kind = {'Lora': 'DoRA' if config.adapter.get('use_dora') else 'LoRA'}.get(kind, kind)
    kind = {4: 'Q', 8: '8-bit ', None: ''}[config.quantization.bits if config.quantization else None] + kind
    rank = config.adapter.get('r')
    return f'{kind}, rank {rank}' if rank else kind


def sources_of(config: TrainConfig) -> list[str]:
    """Names of the data sources: hub ids, and for files and folders only the last part of the path."""
    sources = config.dataset.source if isinstance(config.dataset.source, (list, tuple)) else [config.dataset.source]
    paths = [str(s.get('path') if isinstance(s, Mapping) else s) for s in sources]
    return [public_name(path) for path in paths]


def summary_of(dataset: PreparedDataset, max_length: int, *, share: bool = False) -> dict[str, Any]:
    """Counts of a part, its packing efficiency, and a histogram of conversation lengths.

    Args:
        dataset: Training or validation data.
        max_length: Maximum tokens per pack.
        share: Whether the counts of the whole data are reported elsewhere.
    """
    lengths = dataset.sample_lengths[dataset.sample_numbers]
    counts, edges = np.histogram(lengths, bins=_BINS, range=(0, max(1, int(lengths.max()))))
    return {
        **({} if share else dataset.summary.to_dict()),
        'part_conversations': len(lengths),
        'part_tokens': int(lengths.sum()),
        'packs': len(dataset),
        'fill': dataset.packing_efficiency(max_length),
        'lengths': {'edges': edges.tolist(), 'counts': counts.tolist()},
    }


def latest_losses(work_dir: Path) -> dict[str, Any]:
    """The loss of the last step and the last validation loss in `metrics.jsonl`; empty if there are none."""
    try:
        with (work_dir / METRICS_FILE).open('rb') as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return {}
    latest: dict[str, Any] = {}
    for record in objects(tail):
        latest |= {key: record[key] for key in ('step', 'loss', 'val_loss') if key in record}
    return latest
