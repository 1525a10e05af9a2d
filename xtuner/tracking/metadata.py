"""What a run is, as JSON values: for `about.json`, and for the card in the adapter's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xtuner.config.schema import TrainConfig
from xtuner.dataset.cache.store import PreparedDataset
from xtuner.engine.build import Data
from xtuner.engine.hooks.log import METRICS_FILE
from xtuner.engine.schedule import Plan
from xtuner.model.precision import dtype_name
from xtuner.model.shares import num_parameters
from xtuner.objectives.sft import SupervisedFinetune
from xtuner.registry import reference
from xtuner.tracking.environment import versions
from xtuner.tracking.model_card import public_name

_BINS = 24
_TAIL_BYTES = 2**16  # of the metrics: enough for the last steps
_CARD_VERSIONS = ('xtuner', 'torch', 'transformers', 'peft', 'bitsandbytes')


def about_run(
    config: TrainConfig, data: Data, plan: Plan, model: SupervisedFinetune, dtype: torch.dtype
) -> dict[str, Any]:
    """The facts of `about.json`, beside its sessions."""
    forward = model.llm.get_base_model().get_decoder().forward if hasattr(model.llm, 'get_base_model') else None
    return {
        'base': config.model.path,
        'base_fingerprint': data.base_fingerprint,
        'method': method_of(config),
        'data': ', '.join(sources_of(config)),
        'template': config.model.template,
        'compute_dtype': dtype_name(dtype),
        'fast_path': str(getattr(forward, 'path', '')),
        'parameters': {'all': num_parameters(model), 'trained': num_parameters(model, trained=True)},
        'plan': {
            'num_items': plan.num_items,
            'items_per_step': plan.largest_step,
            'num_steps': plan.num_steps,
            'num_warmup_steps': plan.num_warmup_steps,
            'world_size': plan.world_size,
        },
        'dataset': {
            name: summary_of(
                dataset, config.dataset.max_length, share=name == 'val' and data.dataset.summary == dataset.summary
            )
            for name, dataset in (('train', data.dataset), ('val', data.validation))
            if isinstance(dataset, PreparedDataset)
        },
    }


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
        'fill': dataset.fill(max_length),
        'lengths': {'edges': edges.tolist(), 'counts': counts.tolist()},
    }


def training_facts(config: TrainConfig, data: Data, plan: Plan, dtype: torch.dtype) -> dict[str, Any]:
    """How a run trains, for the card: JSON values, the same for the same run whatever machine it is on."""
    schedule, known = config.schedule, versions()
    facts: dict[str, Any] = {
        'method': method_of(config),
        'data': sources_of(config),
        'train_on': config.dataset.train_on,
        'special_tokens_in_answers': list(
            data.template.allowing(config.dataset.special_tokens_in_answers, data.tokenizer).answer_tokens
        )
        or None,
        'max_length': config.dataset.max_length,
        'steps': plan.num_steps,
        'epochs': None if schedule.max_steps else schedule.max_epochs,
        'tokens_per_step': plan.largest_step * config.dataset.max_length,
        'learning_rate': config.optimizer.get('lr'),
        'decay': schedule.decay,
        'warmup_steps': plan.num_warmup_steps,
        'optimizer': reference(config.optimizer['type']).rpartition(':')[2],
        'precision': dtype_name(dtype),
        'seed': config.runtime.seed,
        'versions': {name: known[name] for name in _CARD_VERSIONS if name in known},
    }
    if config.adapter:
        named = ('r', 'lora_alpha', 'lora_dropout', 'target_modules')
        facts['adapter'] = {name: config.adapter[name] for name in named if name in config.adapter}
    if isinstance(data.dataset, PreparedDataset):
        summary = data.dataset.summary
        facts |= {
            'conversations': summary.kept,
            'tokens': summary.tokens,
            'target_tokens': summary.target_tokens,
        }
    return facts


def latest_losses(work_dir: Path) -> dict[str, Any]:
    """The last step's loss and the last validation loss in `metrics.jsonl`; empty where there are none."""
    try:
        with (work_dir / METRICS_FILE).open('rb') as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found |= {key: record[key] for key in ('step', 'loss', 'val_loss') if key in record}
    return found
