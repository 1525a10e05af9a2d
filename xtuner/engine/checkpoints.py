"""Checkpoints: a PEFT adapter folder with the trainer's state beside it, whole or not there at all.

    work_dir/
      last                         text: the name of the newest checkpoint
      best                         text: the name of the one with the lowest validation loss, where there is validation
      checkpoint-00000100/
        adapter_config.json        peft's own files: plain PeftModel.from_pretrained loads the folder
        adapter_model.safetensors  (a full-parameter run has a model's files here instead)
        tokenizer.json ...         the tokenizer, with its chat template
        xtuner.json                on which base it belongs
        run.json                   the config, the data and the versions of the run (`same_run.py`)
        trainer.json               step, optimizer numbers, loss scaler, validation loss
        trainer.safetensors        optimizer moments
        manifest.json              size and SHA-256 of every file above

A checkpoint is written to a folder with another name, flushed, and then renamed; what goes is renamed first and then
removed. So a process that is killed, at whatever instruction, leaves no torn folder under a checkpoint's name. Nothing
here is pickled.
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

from xtuner.errors import CheckpointError, one_line
from xtuner.files import read_object

LAST_FILE, BEST_FILE = 'last', 'best'
MANIFEST_FILE = 'manifest.json'
STATE_FILE = 'trainer.json'
TENSORS_FILE = 'trainer.safetensors'
VALIDATION_LOSS = 'val_loss'
"""The key of a state under which its checkpoint's validation loss stands; None, or absent, where there is none."""
_PREFIX = 'checkpoint-'
_PARTIAL = '.partial-'  # being written
_TRASH = '.trash-'  # being removed


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are whole is `verify_checkpoint`'s question."""
    found = (p for p in work_dir.glob(f'{_PREFIX}*') if p.is_dir() and p.name.removeprefix(_PREFIX).isdigit())
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint's name says were done."""
    return int(folder.name.removeprefix(_PREFIX))


def write_checkpoint(
    work_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    state: dict[str, Any],
    max_keep: int,
    keep_best: bool = True,
) -> Path:
    """Writes `checkpoint-<step>` as a whole, points `last` and `best`, and removes what is not to be kept.

    Args:
        work_dir: Where checkpoints are kept.
        step: Optimizer steps done.
        write_model: Writes the model's and tokenizer's files into the folder it is given.
        state: The trainer's state: nested dicts and lists of tensors and JSON values.
        max_keep: How many checkpoints stay, the newest; -1 keeps all. Those of later steps, which only a run that was
            resumed from an earlier one finds, are left alone.
        keep_best: Whether the one of the lowest validation loss stays as well.

    Raises:
        CheckpointError: the file system refuses; what was there before is untouched.
    """
    final = work_dir / f'{_PREFIX}{step:08d}'
    partial = work_dir / f'{_PARTIAL}{final.name}'
    try:
        clear_leftovers(work_dir)
        partial.mkdir(parents=True)
        write_model(partial)
        _write_state(partial, state)
        _write_manifest(partial)
    except (OSError, SafetensorError) as error:  # a full disk is either's, as it happens
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, 'strerror', None) or error
        raise CheckpointError(f'cannot save {final}: {reason}; earlier checkpoints are untouched') from error
    try:
        _put_in_place(partial, final)
        point_to_checkpoints(work_dir, step)
        _prune(work_dir, step, max_keep, keep_best)
    except OSError as error:
        raise CheckpointError(
            f'{final} is written, but {work_dir} cannot be put in order: {error.strerror or error}'
        ) from error
    return final


def point_to_checkpoints(work_dir: Path, step: int) -> None:
    """Writes `last`, the newest checkpoint up to `step`, and `best`, that of the lowest validation loss."""
    folders = _up_to(work_dir, step)
    for name, folder in ((LAST_FILE, folders[-1] if folders else None), (BEST_FILE, _best(folders))):
        if folder is not None:
            _write_atomically(work_dir / name, folder.name + '\n')


def recover(work_dir: Path) -> None:
    """Ends what a killed save had begun: a checkpoint that is whole but for its name takes its place."""
    for partial in work_dir.glob(f'{_PARTIAL}{_PREFIX}*'):
        try:
            verify_checkpoint(partial)
        except CheckpointError:
            continue
        _put_in_place(partial, work_dir / partial.name.removeprefix(_PARTIAL))
    clear_leftovers(work_dir)


def clear_leftovers(work_dir: Path) -> None:
    """Removes what an interrupted save or removal left."""
    for prefix in (_PARTIAL, _TRASH):
        for stale in work_dir.glob(f'{prefix}*'):
            shutil.rmtree(stale)


def _put_in_place(partial: Path, final: Path) -> None:
    if final.exists():  # an altered one that was passed over, or one that a resumed run writes again
        final.rename(final.with_name(f'{_TRASH}{final.name}'))
    partial.rename(final)
    _flush(final.parent)


def _prune(work_dir: Path, step: int, max_keep: int, keep_best: bool) -> None:
    folders = _up_to(work_dir, step)
    best = _best(folders) if keep_best else None
    if max_keep > 0:
        for old in folders[:-max_keep]:
            if old != best:
                old.rename(old.with_name(f'{_TRASH}{old.name}'))
    clear_leftovers(work_dir)


def _up_to(work_dir: Path, step: int) -> list[Path]:
    return [folder for folder in list_checkpoints(work_dir) if step_of(folder) <= step]


def _best(folders: list[Path]) -> Path | None:
    losses = [(validation_loss(folder), -step_of(folder), folder) for folder in folders]
    known = [entry for entry in losses if entry[0] is not None]
    return min(known)[2] if known else None


def validation_loss(folder: Path) -> float | None:
    """The validation loss that a checkpoint was written with; None where it had none, or cannot be read."""
    try:
        loss = dict(read_object(folder / STATE_FILE, CheckpointError)['dict']).get(VALIDATION_LOSS)
    except (ValueError, KeyError, TypeError):
        return None
    return loss if isinstance(loss, float) and loss == loss else None


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: a file is missing, torn or altered; names it.
    """
    try:
        manifest = read_object(folder / MANIFEST_FILE, CheckpointError)
        entries = {str(name): (int(e['bytes']), str(e['sha256'])) for name, e in manifest.items()}
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f'{folder}: not a whole checkpoint ({MANIFEST_FILE}: {error})') from error
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f'{folder}: {name} is missing')
        if path.stat().st_size != size:
            raise CheckpointError(f'{path}: {path.stat().st_size} bytes, {size} were written')
        if _digest(path) != digest:
            raise CheckpointError(f'{path}: its content has changed since it was written')


def newest_checkpoint(work_dir: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; one that is not whole is passed over with a word to `warn`. None: there are none.

    Raises:
        CheckpointError: there are some, and not one is whole.
    """
    folders = list_checkpoints(work_dir)
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            warn(f'passed over: {error}')
            continue
        return folder
    if folders:
        raise CheckpointError(f'{work_dir}: no whole checkpoint to resume from; give another --work-dir to start anew')
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer's state as `write_checkpoint` was given it, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing or cannot be understood.
    """
    try:
        state = read_object(folder / STATE_FILE, CheckpointError)
        tensors = load_file(folder / TENSORS_FILE)
        return _join(state, tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f'{folder}: the trainer state cannot be read: {one_line(error)}') from error


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
    manifest = {p.relative_to(folder).as_posix(): {'bytes': p.stat().st_size, 'sha256': _digest(p)} for p in files}
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
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Makes the disk keep a file's content, or the names in a folder, before what follows."""
    if path.is_dir() and os.name != 'posix':  # elsewhere folders cannot be opened, and need not be
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
