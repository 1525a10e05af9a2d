"""Writes `generation_config.json` from the base's settings and the template's stop tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.errors import ModelError, one_line
from xtuner.model.hub import read_json

logger = logging.getLogger('xtuner')

GENERATION_FILE = 'generation_config.json'
_TOKENS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Settings that transformers refuses to save without sampling, without beam search, or without dict outputs.
_SAMPLING_ONLY = (
    'temperature', 'top_p', 'top_k', 'top_h', 'min_p', 'typical_p', 'epsilon_cutoff', 'eta_cutoff',
    'num_return_sequences',
)  # fmt: skip
_BEAMS_ONLY = ('early_stopping', 'length_penalty')
_OUTPUTS_ONLY = ('output_attentions', 'output_hidden_states', 'output_scores', 'output_logits')


def generation_settings(base: Path, stop_ids: Sequence[int] | None) -> dict[str, Any]:
    """Returns the base's settings in a form that transformers can load and save, with all stop tokens.

    Settings without effect are dropped. If transformers rejects the rest, only the special tokens are kept, with a
    warning.

    Args:
        base: The base model's folder; without generation_config.json, its config.json gives the special tokens.
        stop_ids: Stop tokens of the template, which come first; None: only the base's.

    Raises:
        ModelError: The file cannot be read, or its stop tokens are not token ids.
    """
    file = base / GENERATION_FILE
    if file.is_file():
        settings = read_json(file)
    else:
        file = base / 'config.json'
        content = read_json(file)
        settings = {key: content[key] for key in _TOKENS if content.get(key) is not None}
    ends = [*(stop_ids or ()), *_token_ids(settings.get('eos_token_id'), file)]
    settings = _effective(settings)
    if ends:
        settings['eos_token_id'] = list(dict.fromkeys(ends))
    reason = _rejection(settings)
    if reason:
        logger.warning('%s: keeping only its special tokens; transformers rejects the rest: %s', file, reason)
        settings = {key: settings[key] for key in _TOKENS if key in settings}
    return settings


def write_generation_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings as `generation_config.json`."""
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / GENERATION_FILE).write_text(text + '\n', encoding='utf-8')


def _effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Drops settings that have no effect given the others."""
    kept = dict(settings)
    idle: tuple[str, ...] = ()
    if not kept.get('do_sample'):
        idle += _SAMPLING_ONLY
    if kept.get('num_beams') in (None, 1):
        idle += _BEAMS_ONLY
    if not kept.get('return_dict_in_generate'):
        idle += _OUTPUTS_ONLY
    for key in idle:
        kept.pop(key, None)
    return kept


def _rejection(settings: Mapping[str, Any]) -> str | None:
    """Returns why transformers would not save these settings; None if it would."""
    from transformers import GenerationConfig

    try:
        GenerationConfig(**settings).validate(strict=True)
    except Exception as error:  # any type: wrong values fail at their first use
        return one_line(error)
    return None


def _token_ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise ModelError(f'{file}: eos_token_id is {value!r}; expected a token id or a list of them')
    return ids
