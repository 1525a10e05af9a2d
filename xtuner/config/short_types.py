"""Names of optimizers and adapters without a module: `AdamW` is torch's. Known by name, so that nothing is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from xtuner.config.schema import TrainConfig
from xtuner.errors import ConfigError, nearest
from xtuner.registry import BUILDER

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
    # torch's go before bitsandbytes' of the same name.
    'optimizer': {name: f'bitsandbytes.optim:{name}' for name in _BITSANDBYTES}
    | {name: f'torch.optim:{name}' for name in _TORCH},
    'adapter': {name: f'peft:{name}' for name in _PEFT},
}
"""For each section, what a name without a module stands for."""


def with_full_types(config: TrainConfig) -> TrainConfig:
    """The config with 'module:name' for each short name, so that a run keeps what it meant.

    Raises:
        ConfigError: a name that is neither short for anything nor registered.
    """
    changed: dict[str, Any] = {}
    for where, names in SHORT_TYPES.items():
        section: Mapping[str, Any] | None = getattr(config, where)
        kind = (section or {}).get('type')
        if section is None or not isinstance(kind, str) or ':' in kind or '.' in kind or kind in BUILDER.module_dict:
            continue
        if kind not in names:
            hint = nearest(kind, names) or f'; known: {", ".join(sorted(names))}'
            raise ConfigError(f'`{where}.type` {kind!r} is not known{hint}; any other class is written "module:name"')
        changed[where] = {**section, 'type': names[kind]}
    return replace(config, **changed)
