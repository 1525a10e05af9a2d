"""Checkpoints: a PEFT adapter folder with the trainer's state, written atomically.

    work_dir/
      last                         text: name of the newest checkpoint
      best                         text: name of the one with the lowest validation loss, if there is validation
      checkpoint-00000100/
        adapter_config.json        peft's own files: PeftModel.from_pretrained can load the folder
        adapter_model.safetensors  (a full fine-tuning run has a model's files instead)
        tokenizer.json ...         the tokenizer with its chat template
        xtuner.json                the base that it belongs to
        run.json                   config, data and versions of the run (`run_manifest.py`)
        trainer.json               step, optimizer numbers, loss scaler, validation loss
        trainer.safetensors        optimizer moments
        manifest.json              size and SHA-256 of every file above

A checkpoint is written to a folder with a temporary name, flushed, and renamed; a checkpoint to be removed is renamed
first. A process killed at any instruction therefore leaves no incomplete folder under a checkpoint's name. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from xtuner.engine.checkpoint.trainer_state import STATE_FILE, validation_loss, write_state
from xtuner.errors import CheckpointError, one_line
from xtuner.model.run_folder import BEST_FILE, LAST_FILE
from xtuner.utils.files import flush, read_object, write_atomically

logger = logging.getLogger('xtuner')

MANIFEST_FILE = 'manifest.json'
_PREFIX = 'checkpoint-'
_NAME = re.compile(r'checkpoint-[0-9]{1,15}')
# Used by the trainer only; other commands that write into a work folder use other names.
_PARTIAL = '.saving-'
_TRASH = '.removing-'
# Of earlier versions; converters use the first one too, so that only complete checkpoints are taken from it.
_OLD_PARTIAL, _TRASH_PREFIXES = '.partial-', (_TRASH, '.trash-')


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Lists finished checkpoints, oldest first; `verify_checkpoint` checks whether they are complete.

    Only folders, or links to folders, with a manifest or a trainer's state count.
    """
    folders = (p for p in work_dir.glob(f'{_PREFIX}*') if _NAME.fullmatch(p.name))
    return sorted((p for p in folders if _has_manifest(p) or (p / STATE_FILE).is_file()), key=step_of)


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return work_dir / f'{_PREFIX}{step:08d}'


def has_checkpoint(work_dir: Path, step: int) -> bool:
    """Whether the finished checkpoint of a step exists."""
    return _has_manifest(checkpoint_folder(work_dir, step))


def step_of(folder: Path) -> int:
    """Number of optimizer steps in the name of a checkpoint, or of the folder that a link points to."""
    name = folder.name if _NAME.fullmatch(folder.name) else folder.resolve().name
    return int(name.removeprefix(_PREFIX))


def write_checkpoint(
    work_dir: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    state: dict[str, Any],
    max_keep: int,
    keep_best: bool = True,
) -> Path:
    """Writes `checkpoint-<step>` atomically, updates `last` and `best`, and removes old checkpoints.

    Args:
        work_dir: The folder of the checkpoints.
        step: Completed optimizer steps.
        write_model: Writes the model's and tokenizer's files into the folder that it is given.
        state: The trainer's state: nested dicts and lists of tensors and JSON values.
        max_keep: Number of newest checkpoints to keep; -1 keeps all. Those of later steps, which exist only if the run
            was resumed from an earlier one, are not touched.
        keep_best: Whether to also keep the one with the lowest validation loss.

    Raises:
        CheckpointError: Writing fails; existing checkpoints are untouched.
    """
    final = checkpoint_folder(work_dir, step)
    partial = work_dir / f'{_PARTIAL}{final.name}'
    try:
        clear_leftovers(work_dir)
        partial.mkdir(parents=True)
        write_model(partial)
        write_state(partial, state)
        _write_manifest(partial)
    except (OSError, SafetensorError) as error:  # a full disk can raise either
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, 'strerror', None) or error
        raise CheckpointError(f'cannot save {final}: {reason}; earlier checkpoints are untouched') from error
    try:
        _publish(partial, final)
        point_to_checkpoints(work_dir, step)
        _prune(work_dir, step, max_keep, keep_best)
    except OSError as error:
        raise CheckpointError(
            f'{final} was written, but {work_dir} cannot be cleaned up: {error.strerror or error}'
        ) from error
    return final


def point_to_checkpoints(work_dir: Path, step: int) -> None:
    """Writes `last`, the newest checkpoint up to `step`, and `best`, the one with the lowest validation loss."""
    folders = _up_to(work_dir, step)
    for name, folder in ((LAST_FILE, folders[-1] if folders else None), (BEST_FILE, _best(folders))):
        if folder is not None:
            write_atomically(work_dir / name, folder.name + '\n', durable=True)


def recover(work_dir: Path) -> None:
    """Completes a killed save: a checkpoint that only lacks its final name is renamed."""
    for prefix in (_PARTIAL, _OLD_PARTIAL):
        for partial in _trainer_folders(work_dir, prefix):
            try:
                verify_checkpoint(partial)
            except CheckpointError:
                continue
            _publish(partial, work_dir / partial.name.removeprefix(prefix))
    clear_leftovers(work_dir)


def clear_leftovers(work_dir: Path) -> None:
    """Removes leftovers of an interrupted save or removal; the caller must hold the work folder's lock.

    Links, files and folders of other names are not touched.
    """
    stale = [folder for prefix in (_PARTIAL, *_TRASH_PREFIXES) for folder in _trainer_folders(work_dir, prefix)]
    # Of an earlier version and incomplete, otherwise it would have been published; converters write no trainer's state.
    stale += [folder for folder in _trainer_folders(work_dir, _OLD_PARTIAL) if (folder / STATE_FILE).is_file()]
    for folder in stale:
        shutil.rmtree(folder)


def _trainer_folders(work_dir: Path, prefix: str) -> list[Path]:
    """Folders that the trainer created, named by a prefix and a checkpoint's name."""
    paths = work_dir.glob(f'{prefix}{_PREFIX}*')
    return [p for p in paths if _NAME.fullmatch(p.name.removeprefix(prefix)) and p.is_dir() and not p.is_symlink()]


def _publish(partial: Path, final: Path) -> None:
    if _is_removable(final):  # a damaged one that was skipped, or one that a resumed run writes again
        final.rename(final.with_name(f'{_TRASH}{final.name}'))
    elif final.is_symlink() or final.exists():
        aside = next(
            p for i in itertools.count(1) if not os.path.lexists(p := final.with_name(f'{final.name}.old-{i}'))
        )
        final.rename(aside)
        logger.warning('%s is a link, or was not written by xtuner: renaming it to %s', final, aside.name)
    partial.rename(final)
    flush(final.parent)


def _is_removable(folder: Path) -> bool:
    """Whether this is a checkpoint's own folder, which may be removed; a link may point anywhere."""
    return _has_manifest(folder) and not folder.is_symlink()


def _prune(work_dir: Path, step: int, max_keep: int, keep_best: bool) -> None:
    folders = _up_to(work_dir, step)
    best = _best(folders) if keep_best else None
    if max_keep > 0:
        for old in folders[:-max_keep]:
            if old != best and _is_removable(old):
                old.rename(old.with_name(f'{_TRASH}{old.name}'))
    clear_leftovers(work_dir)


def _up_to(work_dir: Path, step: int) -> list[Path]:
    return [folder for folder in list_checkpoints(work_dir) if step_of(folder) <= step]


def _best(folders: list[Path]) -> Path | None:
    losses = [(validation_loss(folder), -step_of(folder), folder) for folder in folders]
    with_loss = [entry for entry in losses if entry[0] is not None]
    return min(with_loss)[2] if with_loss else None


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: A file is missing, truncated or altered; names it.
    """
    for name, (size, digest) in _read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f'{folder}: {name} is missing')
        if path.stat().st_size != size:
            raise CheckpointError(f'{path}: has {path.stat().st_size} bytes, but {size} were written')
        if _digest(path) != digest:
            raise CheckpointError(f'{path}: its content has changed since it was written')


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file."""
    try:
        manifest = read_object(folder / MANIFEST_FILE, CheckpointError)
        return {str(name): (int(e['bytes']), str(e['sha256'])) for name, e in manifest.items()}
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f'{folder}: not a complete checkpoint ({MANIFEST_FILE}: {one_line(error)})') from error


def _has_manifest(folder: Path) -> bool:
    """Whether a folder contains a valid manifest."""
    try:
        return bool(_read_manifest(folder))
    except CheckpointError:
        return False


def newest_checkpoint(work_dir: Path, *, warn: Callable[[str], None]) -> Path | None:
    """Returns the newest complete checkpoint, warning about incomplete ones; None if there are no checkpoints.

    Raises:
        CheckpointError: There are checkpoints, but none is complete.
    """
    folders = list_checkpoints(work_dir)
    for folder in reversed(folders):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            warn(f'skipping a checkpoint: {error}')
            continue
        return folder
    if folders:
        raise CheckpointError(
            f'{work_dir}: no complete checkpoint to resume from; choose another --work-dir to start from scratch'
        )
    return None


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.rglob('*') if p.is_file())
    manifest = {p.relative_to(folder).as_posix(): {'bytes': p.stat().st_size, 'sha256': _digest(p)} for p in files}
    for path in files:
        flush(path)
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=1) + '\n', durable=True)


def _digest(path: Path) -> str:
    with path.open('rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
