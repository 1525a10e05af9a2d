"""Writes the files of a model folder besides its weights: config, tokenizer, generation settings, provenance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.adapters.attach import PROVENANCE_FILE, Provenance
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ModelError
from xtuner.model.generation_settings import generation_settings, write_generation_settings
from xtuner.model.hub import read_json
from xtuner.model.tokenizer import load_tokenizer
from xtuner.tracking.model_card import prompt_example, write_card

# Tokenizer files in all published formats, and license files.
_COMPANIONS = (
    '*.model', 'tokenizer*.json', 'vocab.json', 'vocab.txt', 'merges.txt', 'added_tokens.json',
    'special_tokens_map.json', 'chat_template*', '*.tiktoken', 'LICENSE*', 'NOTICE*', 'preprocessor_config.json',
)  # fmt: skip
# Settings that transformers refuses to save without sampling.
_SAMPLING_ONLY = ('temperature', 'top_p', 'top_k', 'min_p', 'typical_p', 'epsilon_cutoff', 'eta_cutoff')


def write_model_files(
    folder: Path, base: Path, adapter: Path | None, provenance: Provenance | None, changes: dict[str, Any]
) -> str:
    """Writes config, generation settings with stop ids, tokenizer with chat template, and provenance.

    Args:
        folder: The output folder, which contains the weights.
        base: The base model's folder.
        adapter: The adapter's folder, whose tokenizer is used if it has one; None: no adapter.
        provenance: The adapter's training metadata.
        changes: Fields of the config that differ from the base's.

    Returns:
        An example conversation in the prompt format, for the model card.
    """
    write_config(folder, read_json(base / 'config.json') | changes)
    has_tokenizer = adapter is not None and (adapter / 'tokenizer_config.json').is_file()
    tokenizer: Any = load_tokenizer(adapter if has_tokenizer and adapter else base)
    stops = None
    if provenance:
        template = get_template(provenance.template, tokenizer)
        if provenance.template != 'from_tokenizer':
            tokenizer.chat_template = template.chat_template()
        stops = template.stop_ids(tokenizer)
    write_generation_settings(folder, generation_settings(base, stops))
    tokenizer.save_pretrained(folder)
    copy_companions(base, folder)
    if adapter is not None and (adapter / PROVENANCE_FILE).is_file():
        shutil.copyfile(adapter / PROVENANCE_FILE, folder / PROVENANCE_FILE)
    example = prompt_example(tokenizer)
    if provenance:
        write_card(folder, provenance, kind='merged', example=example)
    return example


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Writes `config.json` without fields that apply only to the published folder."""
    config = {key: value for key, value in config.items() if key not in ('auto_map', 'torch_dtype')}
    write_json(folder / 'config.json', config)  # auto_map names code files, which are neither copied nor needed


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copies tokenizer and license files that the folder does not have yet; returns their names.

    Raises:
        ModelError: A file cannot be read.
    """
    files = {path for pattern in _COMPANIONS for path in source.glob(pattern) if path.is_file()}
    names = sorted(path.name for path in files if not (folder / path.name).exists())
    for name in names:
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            # Reported here, since `atomic_folder` attributes an OSError to the output disk.
            raise ModelError(f'{source / name} cannot be read: {error.strerror or error}') from error
        (folder / name).write_bytes(content)
    return names


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON settings file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
