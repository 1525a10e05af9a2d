"""An adapter and its base to plain weights: tensor by tensor, from shard to shard, on the CPU."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.convert.delta import AdapterFile
from xtuner.convert.output import check_output, whole_folder
from xtuner.convert.shards import ShardWriter
from xtuner.dataset.template import get_template
from xtuner.errors import CheckpointError, ModelError
from xtuner.model.adapter import PROVENANCE_FILE, check_adapter
from xtuner.model.loading import load_tokenizer, read_json, resolve_model
from xtuner.model.weights import WeightReader, fingerprint, open_weights

logger = logging.getLogger('xtuner')

DTYPES = {'fp16': torch.float16, 'bf16': torch.bfloat16, 'fp32': torch.float32}


def merge(llm: str, adapter: Path, out: Path, *, dtype: str | None = None, max_shard_bytes: int = 2 * 10**9) -> Path:
    """Writes a model folder whose weights are the published base's plus the adapter's.

    Args:
        llm: The base model's folder or hub id.
        adapter: A peft LoRA adapter, such as a checkpoint of `xtuner train`.
        out: A folder that is missing or empty. It appears as a whole at the end.
        dtype: 'fp16', 'bf16' or 'fp32'; None takes what the adapter was trained in, float32 training becoming fp16.
        max_shard_bytes: Most bytes of one .safetensors file, unless one tensor alone is larger.

    Returns:
        `out`.

    Raises:
        CheckpointError: an adapter of another base, one that adapts tensors the base has not, or changes nothing.
        ModelError: the base cannot be read, or `out` is not empty.
    """
    check_output(out)
    base = resolve_model(llm)
    reader = open_weights(base)
    provenance = check_adapter(adapter, fingerprint(reader))
    trained_in = provenance.compute_dtype if provenance else 'fp16'
    dtype = dtype or ('bf16' if trained_in == 'bf16' else 'fp16')
    changes = AdapterFile(adapter)
    if missing := sorted(changes.targets - set(reader.names())):
        raise CheckpointError(f'{adapter} adapts {missing[0]} and {len(missing) - 1} more that {llm} has not')
    logger.info('merging %s into %s, %s, base weights as published', adapter, llm, dtype)
    with whole_folder(out) as folder:
        _write_weights(reader, changes, folder, DTYPES[dtype], max_shard_bytes)
        _write_rest(base, adapter, provenance.template if provenance else None, folder, dtype)
    return out


def _write_weights(
    reader: WeightReader, changes: AdapterFile, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Shards and their index; checks that the adapter changed what it names."""
    num_changed, started = 0, time.perf_counter()
    writer, names = ShardWriter(folder, max_shard_bytes), reader.names()
    for number, name in enumerate(names, 1):
        before = reader.read(name)
        after = changes.apply(name, before)
        num_changed += name in changes.targets and not torch.equal(after, before.float())
        writer.add(name, _cast(after, dtype, name))
        if number % 50 == 0 or number == len(names):
            left = (time.perf_counter() - started) / number * (len(names) - number)
            logger.info('%d of %d tensors, %.2f GB, eta %.0f s', number, len(names), writer.num_bytes / 1e9, left)
    if num_changed == 0:
        raise CheckpointError('the adapter changes no weight: it was not trained, or its update is all zero')
    writer.close()
    logger.info('%d of %d adapted tensors changed', num_changed, len(changes.targets))


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise ModelError(f'{name} has values that {str(dtype).removeprefix("torch.")} cannot hold; use --dtype bf16')
    return cast


def _write_rest(base: Path, adapter: Path, template_name: str | None, folder: Path, dtype: str) -> None:
    """Config, generation settings with the right stop ids, tokenizer with its chat template, provenance."""
    config = read_json(base / 'config.json')
    config.pop('auto_map', None)  # names code files that are not copied and not needed
    config.pop('torch_dtype', None)
    config['dtype'] = str(DTYPES[dtype]).removeprefix('torch.')
    _write_json(folder / 'config.json', config)
    tokenizer = load_tokenizer(adapter if (adapter / 'tokenizer_config.json').is_file() else base)
    generation = read_json(base / 'generation_config.json') if (base / 'generation_config.json').is_file() else {}
    if template_name:
        template = get_template(template_name, tokenizer)
        tokenizer.chat_template = template.chat_template()
        generation['eos_token_id'] = template.stop_ids(tokenizer)
    if not generation.get('do_sample'):  # transformers refuses to save these without sampling
        for key in ('temperature', 'top_p', 'top_k'):
            generation.pop(key, None)
    _write_json(folder / 'generation_config.json', generation)
    tokenizer.save_pretrained(folder)
    if (base / 'tokenizer.model').is_file() and not (folder / 'tokenizer.model').is_file():
        shutil.copyfile(base / 'tokenizer.model', folder / 'tokenizer.model')  # an adapter's folder does without it
    if (adapter / PROVENANCE_FILE).is_file():
        shutil.copyfile(adapter / PROVENANCE_FILE, folder / PROVENANCE_FILE)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
