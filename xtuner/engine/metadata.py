"""What a run is, as JSON values: `run_metadata` for `about.json`, `training_facts` for the adapter's model card."""

from __future__ import annotations

from typing import Any

import torch

from xtuner.config.schema import TrainConfig
from xtuner.dataset.cache.store import PreparedDataset
from xtuner.engine.build import RunInputs
from xtuner.engine.schedule import TrainingSchedule
from xtuner.model.precision import dtype_name
from xtuner.model.sharded_loading import num_parameters
from xtuner.objectives.model import TrainingModel
from xtuner.registry import reference
from xtuner.tracking.environment import versions
from xtuner.tracking.metadata import method_of, sources_of, summary_of

_CARD_VERSIONS = ('xtuner', 'torch', 'transformers', 'peft', 'bitsandbytes')


def run_metadata(
    config: TrainConfig, data: RunInputs, plan: TrainingSchedule, model: TrainingModel, dtype: torch.dtype
) -> dict[str, Any]:
    """The facts of `about.json`, without its sessions."""
    forward = model.llm.get_base_model().get_decoder().forward if hasattr(model.llm, 'get_base_model') else None
    return {
        'base': config.model.path,
        'base_fingerprint': data.base_fingerprint,
        'method': method_of(config),
        'data': ', '.join(sources_of(config)),
        'template': config.model.template,
        'compute_dtype': dtype_name(dtype),
        'fast_path': str(getattr(forward, 'status', '')),
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


def training_facts(config: TrainConfig, data: RunInputs, plan: TrainingSchedule, dtype: torch.dtype) -> dict[str, Any]:
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
    if config.objective != 'sft':
        section = config.objective if isinstance(config.objective, dict) else {'type': config.objective}
        facts['objective'] = reference(section['type']).rpartition(':')[2]
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
