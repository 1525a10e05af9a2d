"""Checkpoints: a PEFT adapter folder with the trainer's state beside it, whole or not there at all.

    work_dir/
      last                         text: the name of the newest checkpoint
      checkpoint-00000100/
        adapter_config.json        peft's own files: plain PeftModel.from_pretrained loads the folder
        adapter_model.safetensors  (a full-parameter run has a model's files here instead)
        tokenizer.json ...         the tokenizer, with its chat template
        xtuner.json                on which base it belongs
        trainer.json               step, what the run was planned on, optimizer numbers, loss scaler
        trainer.safetensors        optimizer moments
        manifest.json              size and SHA-256 of every file above

A checkpoint is written to a folder with another name, flushed, and then renamed. Nothing here is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from xtuner.errors import CheckpointError

LAST_FILE = 'last'
MANIFEST_FILE = 'manifest.json'
STATE_FILE = 'trainer.json'
TENSORS_FILE = 'trainer.safetensors'
_PREFIX = 'checkpoint-'
_PARTIAL = '.partial-'


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are whole is `verify_checkpoint`'s question."""
    found = (p for p in work_dir.glob(f'{_PREFIX}*') if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit())
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def write_checkpoint(
    work_dir: Path, step: int, *, write_model: Callable[[Path], None], state: dict[str, Any], max_keep: int
) -> Path:
    """Writes `checkpoint-<step>` as a whole, points `last` at it, and removes what is older than the `max_keep` newest.

    Args:
        work_dir: Where checkpoints are kept.
        step: Optimizer steps done.
        write_model: Writes the model's and tokenizer's files into the folder it is given.
        state: The trainer's state: nested dicts and lists of tensors and JSON values.
        max_keep: How many checkpoints stay; -1 keeps all.

    Raises:
        CheckpointError: the file system refuses; what was there before is untouched.
    """
    final = work_dir / f'{_PREFIX}{step:08d}'
    partial = work_dir / f'{_PARTIAL}{final.name}'
    try:
        for stale in work_dir.glob(f'{_PARTIAL}*'):  # what an interrupted save left
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        write_model(partial)
        _write_state(partial, state)
        _write_manifest(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _write_atomically(work_dir / LAST_FILE, final.name + '\n')
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f'cannot save {final}: {error.strerror or error}; earlier checkpoints are untouched'
        ) from error
    if max_keep > 0:
        for old in list_checkpoints(work_dir)[:-max_keep]:
            shutil.rmtree(old)
    return final


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: a file is missing, torn or altered; names it.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding='utf-8'))
        entries = {str(name): (int(e['bytes']), str(e['sha256'])) for name, e in manifest.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f'{folder}: not a whole checkpoint ({MANIFEST_FILE}: {error})') from error
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f'{folder}: {name} is missing')
        if path.stat().st_size != size:
            raise CheckpointError(f'{path}: {path.stat().st_size} bytes, {size} were written')
        if _digest(path) != digest:
            raise CheckpointError(f'{path}: its content has changed since it was written')


def newest_checkpoint(work_dir: Path, *, warn: Callable[[str], None]) -> Path:
    """The newest whole checkpoint; one that is not whole is passed over with a word to `warn`.

    Raises:
        CheckpointError: there is none.
    """
    for folder in reversed(list_checkpoints(work_dir)):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            warn(f'passed over: {error}')
            continue
        return folder
    raise CheckpointError(f'{work_dir}: no whole checkpoint to resume from; start without --resume')


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer's state as `write_checkpoint` was given it, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or cannot be understood.
    """
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding='utf-8'))
        tensors = load_file(folder / TENSORS_FILE)
        return _join(state, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f'{folder}: the trainer state cannot be read: {error}') from error


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    (folder / STATE_FILE).write_text(json.dumps(_split(state, '', tensors), indent=1) + '\n', encoding='utf-8')
    save_file(tensors, folder / TENSORS_FILE)


def _split(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for a nested state; a tensor goes to `tensors` and leaves its name behind."""
    if isinstance(value, torch.Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {'tensor': path}
    if isinstance(value, dict):  # a list of pairs keeps keys that are no text
        return {'dict': [[key, _split(item, f'{path}/{key}', tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = 'tuple' if isinstance(value, tuple) else 'list'
        return {kind: [_split(item, f'{path}/{i}', tensors) for i, item in enumerate(value)]}
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_split`."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == 'tensor':
        return tensors[content]
    if kind == 'dict':
        return {key: _join(item, tensors) for key, item in content}
    items = [_join(item, tensors) for item in content]
    return tuple(items) if kind == 'tuple' else items


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    manifest = {str(p.relative_to(folder)): {'bytes': p.stat().st_size, 'sha256': _digest(p)} for p in files}
    for path in files:
        _flush(path)
    _write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + '\n')


def _digest(path: Path) -> str:
    with path.open('rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(f'{path.name}.partial')
    partial.write_text(text, encoding='utf-8')
    _flush(partial)
    os.replace(partial, path)


def _flush(path: Path) -> None:
    with path.open('rb') as file:
        os.fsync(file.fileno())
