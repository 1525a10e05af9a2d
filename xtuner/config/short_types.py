"""Short names of optimizers, adapters and objectives, such as `AdamW` for torch's; nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xtuner.config.schema import TrainConfig
from xtuner.errors import ConfigError, nearest
from xtuner.registry import BUILDER
from xtuner.utils.fields import shown

_TORCH = ('ASGD', 'Adadelta', 'Adafactor', 'Adagrad', 'Adam', 'AdamW', 'Adamax', 'LBFGS', 'Muon', 'NAdam', 'RAdam',
          'RMSprop', 'Rprop', 'SGD', 'SparseAdam')  # fmt: skip
_BITSANDBYTES = tuple(
    f'{paged}{name}{bits}'
    for paged in ('', 'Paged')
    for name in ('AdamW', 'Adam', 'Lion', 'AdEMAMix')
    for bits in ('', '8bit', '32bit')
)
_PEFT = ('AdaLoraConfig', 'IA3Config', 'LoHaConfig', 'LoKrConfig', 'LoraConfig', 'OFTConfig', 'VeraConfig')
SHORT_TYPES: dict[str, dict[str, str]] = {
    # torch's take precedence over those of bitsandbytes with the same name.
    'optimizer': {name: f'bitsandbytes.optim:{name}' for name in _BITSANDBYTES}
    | {name: f'torch.optim:{name}' for name in _TORCH},
    'adapter': {name: f'peft:{name}' for name in _PEFT},
}
"""Section -> short name -> 'module:name'."""


OBJECTIVES = {'sft': 'xtuner.objectives.sft:Sft'}
"""Shipped objectives; a config keeps their short names."""


def with_full_types(config: TrainConfig) -> TrainConfig:
    """Replaces short names in a config by 'module:name', so that the config of a run stays unambiguous.

    Raises:
        ConfigError: a name is neither a short name nor registered.
    """
    changed: dict[str, Any] = {}
    for where, names in SHORT_TYPES.items():
        section: Mapping[str, Any] | None = getattr(config, where)
        kind = (section or {}).get('type')
        if section is None or not isinstance(kind, str) or ':' in kind or '.' in kind or kind in BUILDER.module_dict:
            continue
        if kind not in names:
            hint = nearest(kind, names) or f'; available: {", ".join(sorted(names))}'
            raise ConfigError(f'unknown `{where}.type` {kind!r}{hint}; write any other class as "module:name"')
        changed[where] = {**section, 'type': names[kind]}
    return replace(config, **changed, objective=_known_objective(config.objective))


def _known_objective(objective: Any) -> Any:
    """Normalizes the `objective` of a config; one without arguments becomes its name alone.

    Raises:
        ConfigError: the name is neither a shipped objective nor 'module:name'.
    """
    section = objective if isinstance(objective, Mapping) else {'type': objective}
    kind = section['type']
    if isinstance(kind, str) and ':' not in kind and kind not in OBJECTIVES:
        hint = nearest(kind, OBJECTIVES) or f'; available: {", ".join(OBJECTIVES)}'
        raise ConfigError(f'unknown `objective` {shown(kind)}{hint}; write your own function or class as '
                          '"module:name" or "file.py:name"')  # fmt: skip
    return kind if set(section) == {'type'} and isinstance(kind, str) else objective
