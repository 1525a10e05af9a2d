"""The `generation_config.json` of what is written, from the base's and the template's end tokens."""

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
# What transformers refuses to save where nothing is sampled, searched by beams, or returned beside the answer.
_SAMPLING_ONLY = (
    'temperature', 'top_p', 'top_k', 'top_h', 'min_p', 'typical_p', 'epsilon_cutoff', 'eta_cutoff',
    'num_return_sequences',
)  # fmt: skip
_BEAMS_ONLY = ('early_stopping', 'length_penalty')
_OUTPUTS_ONLY = ('output_attentions', 'output_hidden_states', 'output_scores', 'output_logits')


def generation_settings(base: Path, stop_ids: Sequence[int] | None) -> dict[str, Any]:
    """The base's settings in a form that transformers loads and saves, with all end tokens of base and template.

    Settings that have no effect are left out, and where transformers refuses what is left, all but the special tokens,
    with a warning.

    Args:
        base: The base model's folder; without a generation_config.json its config.json gives the special tokens.
        stop_ids: Where an answer ends by the template; these come first. None: only where the base says.

    Raises:
        ModelError: the file cannot be read, or its end tokens are no token ids.
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
    reason = _refusal(settings)
    if reason:
        logger.warning('%s: only its special tokens are taken over; transformers refuses the rest: %s', file, reason)
        settings = {key: settings[key] for key in _TOKENS if key in settings}
    return settings


def write_generation_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes them as `generation_config.json`."""
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    (folder / GENERATION_FILE).write_text(text + '\n', encoding='utf-8')


def _effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that change nothing beside the others."""
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


def _refusal(settings: Mapping[str, Any]) -> str | None:
    """Why transformers would not save these settings; None where it would."""
    from transformers import GenerationConfig

    try:
        GenerationConfig(**settings).validate(strict=True)
    except Exception as error:  # of any kind: values of a wrong type fail wherever they are used first
        return one_line(error)
    return None


def _token_ids(value: Any, file: Path) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise ModelError(f'{file}: eos_token_id is {value!r}; expected a token id or a list of them')
    return ids
