"""An adapter and its base to plain weights: tensor by tensor, from shard to shard, on the CPU."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from xtuner.convert.delta import AdapterFile
from xtuner.dataset.template import get_template
from xtuner.errors import CheckpointError, ModelError
from xtuner.model.adapter import PROVENANCE_FILE, check_adapter
from xtuner.model.loading import load_tokenizer, resolve_model
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
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f'{out} is not empty; nothing was written: name another folder or remove it')
    base = resolve_model(llm)
    reader = open_weights(base)
    provenance = check_adapter(adapter, fingerprint(reader))
    trained_in = provenance.compute_dtype if provenance else 'fp16'
    dtype = dtype or ('bf16' if trained_in == 'bf16' else 'fp16')
    changes = AdapterFile(adapter)
    if missing := sorted(changes.targets - set(reader.names())):
        raise CheckpointError(f'{adapter} adapts {missing[0]} and {len(missing) - 1} more that {llm} has not')
    logger.info('merging %s into %s, %s, base weights as published', adapter, llm, dtype)
    partial = out.with_name(f'.partial-{out.name}')
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_weights(reader, changes, partial, DTYPES[dtype], max_shard_bytes)
        _write_rest(base, adapter, provenance.template if provenance else None, partial, dtype)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ModelError(f'cannot write {out}: {error.strerror or error}') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _write_weights(
    reader: WeightReader, changes: AdapterFile, folder: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    """Shards and their index; checks that the adapter changed what it names."""
    shards: list[list[str]] = []
    size, total, num_changed, started = 0, 0, 0, time.perf_counter()
    pending: dict[str, Tensor] = {}
    names = reader.names()
    for i, name in enumerate(names, 1):
        before = reader.read(name)
        after = changes.apply(name, before)
        num_changed += name in changes.targets and not torch.equal(after, before.float())
        tensor = _cast(after, dtype, name)
        if pending and size + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards) + 1, pending))
            pending, size = {}, 0
        pending[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
        if i % 50 == 0 or i == len(names):
            left = (time.perf_counter() - started) / i * (len(names) - i)
            logger.info('%d of %d tensors, %.1f GB, eta %.0f s', i, len(names), total / 1e9, left)
    shards.append(_write_shard(folder, len(shards) + 1, pending))
    if num_changed == 0:
        raise CheckpointError('the adapter changes no weight: it was not trained, or its update is all zero')
    logger.info('%d of %d adapted tensors changed', num_changed, len(changes.targets))
    _name_shards(folder, shards, total)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise ModelError(f'{name} has values that {str(dtype).removeprefix("torch.")} cannot hold; use --dtype bf16')
    return cast


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, folder / f'{number:05d}.safetensors', metadata={'format': 'pt'})
    return list(tensors)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Gives the shards their published names, which say how many there are, and writes the index."""
    if len(shards) == 1:
        (folder / '00001.safetensors').rename(folder / 'model.safetensors')
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f'model-{number:05d}-of-{len(shards):05d}.safetensors'
        (folder / f'{number:05d}.safetensors').rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')


def _write_rest(base: Path, adapter: Path, template_name: str | None, folder: Path, dtype: str) -> None:
    """Config, generation settings with the right stop ids, tokenizer with its chat template, provenance."""
    config = _read_json(base / 'config.json')
    config.pop('auto_map', None)  # names code files that are not copied and not needed
    config.pop('torch_dtype', None)
    config['dtype'] = str(DTYPES[dtype]).removeprefix('torch.')
    _write_json(folder / 'config.json', config)
    tokenizer = load_tokenizer(adapter if (adapter / 'tokenizer_config.json').is_file() else base)
    generation = _read_json(base / 'generation_config.json') if (base / 'generation_config.json').is_file() else {}
    if template_name:
        template = get_template(template_name, tokenizer)
        tokenizer.chat_template = template.chat_template()
        generation['eos_token_id'] = template.stop_ids(tokenizer)
    if not generation.get('do_sample'):  # transformers refuses to save these without sampling
        for key in ('temperature', 'top_p', 'top_k'):
            generation.pop(key, None)
    _write_json(folder / 'generation_config.json', generation)
    tokenizer.save_pretrained(folder)
    if (adapter / PROVENANCE_FILE).is_file():
        shutil.copyfile(adapter / PROVENANCE_FILE, folder / PROVENANCE_FILE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (OSError, ValueError) as error:
        raise ModelError(f'{path} cannot be read: {error}') from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
