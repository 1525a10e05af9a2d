"""Facts about a run as JSON values: its method, data and latest losses."""

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
_TAIL_BYTES = 2**16  # of the metrics: enough for the last steps


def method_of(config: TrainConfig) -> str:
    """'QLoRA, rank 64', 'LoRA, rank 8', 'all weights'; another adapter by its config's name."""
    if config.adapter is None:
        return 'all weights'
    kind = reference(config.adapter['type']).partition(':')[2].removesuffix('Config')
    kind = {'Lora': 'DoRA' if config.adapter.get('use_dora') else 'LoRA'}.get(kind, kind)
    kind = {4: 'Q', 8: '8-bit ', None: ''}[config.quantization.bits if config.quantization else None] + kind
    rank = config.adapter.get('r')
    return f'{kind}, rank {rank}' if rank else kind


def sources_of(config: TrainConfig) -> list[str]:
    """The data's names: hub ids as they are, of files and folders the last part only."""
    sources = config.dataset.source if isinstance(config.dataset.source, (list, tuple)) else [config.dataset.source]
    paths = [str(s.get('path') if isinstance(s, Mapping) else s) for s in sources]
    return [public_name(path) for path in paths]


def summary_of(dataset: PreparedDataset, max_length: int, *, share: bool = False) -> dict[str, Any]:
    """A part's counts, how full its packs are, and how long its conversations.

    Args:
        dataset: Training or validation data.
        max_length: Tokens that a pack may have.
        share: Whether it is a share of data whose counts are told elsewhere.
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
    """The last step's loss and the last validation loss in `metrics.jsonl`; empty where there are none."""
    try:
        with (work_dir / METRICS_FILE).open('rb') as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for record in objects(tail):
        found |= {key: record[key] for key in ('step', 'loss', 'val_loss') if key in record}
    return found
