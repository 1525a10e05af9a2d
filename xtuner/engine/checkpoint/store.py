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
# Of the trainer alone: other commands that write into a work folder have names of their own.
_PARTIAL = '.saving-'
_TRASH = '.removing-'
# Of earlier versions; converters have the first one too, so that only what is whole is taken.
_PARTIAL_BEFORE, _TRASH_ALSO = '.partial-', (_TRASH, '.trash-')


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first; whether they are whole is `verify_checkpoint`'s question.

    A folder, or a link to one, with a manifest of ours or a trainer's state; whatever else has such a name is not ours.
    """
    found = (p for p in work_dir.glob(f'{_PREFIX}*') if _NAME.fullmatch(p.name))
    return sorted((p for p in found if _has_manifest(p) or (p / STATE_FILE).is_file()), key=step_of)


def checkpoint_folder(work_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return work_dir / f'{_PREFIX}{step:08d}'


def has_checkpoint(work_dir: Path, step: int) -> bool:
    """Whether the finished checkpoint of a step is there."""
    return _has_manifest(checkpoint_folder(work_dir, step))


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint's name, or that of what a link leads to, says were done."""
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
    final = checkpoint_folder(work_dir, step)
    partial = work_dir / f'{_PARTIAL}{final.name}'
    try:
        clear_leftovers(work_dir)
        partial.mkdir(parents=True)
        write_model(partial)
        write_state(partial, state)
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
            write_atomically(work_dir / name, folder.name + '\n', durable=True)


def recover(work_dir: Path) -> None:
    """Ends what a killed save had begun: a checkpoint that is whole but for its name takes its place."""
    for prefix in (_PARTIAL, _PARTIAL_BEFORE):
        for partial in _own(work_dir, prefix):
            try:
                verify_checkpoint(partial)
            except CheckpointError:
                continue
            _put_in_place(partial, work_dir / partial.name.removeprefix(prefix))
    clear_leftovers(work_dir)


def clear_leftovers(work_dir: Path) -> None:
    """Removes what an interrupted save or removal of a trainer left; who holds the work folder's lock is the only one.

    Links, files and folders of other names are not touched.
    """
    stale = [folder for prefix in (_PARTIAL, *_TRASH_ALSO) for folder in _own(work_dir, prefix)]
    # Of an earlier version, and torn, else it would have been put in place; a converter writes no trainer's state.
    stale += [folder for folder in _own(work_dir, _PARTIAL_BEFORE) if (folder / STATE_FILE).is_file()]
    for folder in stale:
        shutil.rmtree(folder)


def _own(work_dir: Path, prefix: str) -> list[Path]:
    """Folders that a trainer gave a checkpoint's name behind a prefix."""
    found = work_dir.glob(f'{prefix}{_PREFIX}*')
    return [p for p in found if _NAME.fullmatch(p.name.removeprefix(prefix)) and p.is_dir() and not p.is_symlink()]


def _put_in_place(partial: Path, final: Path) -> None:
    if _may_go(final):  # an altered one that was passed over, or one that a resumed run writes again
        final.rename(final.with_name(f'{_TRASH}{final.name}'))
    elif final.is_symlink() or final.exists():
        aside = next(
            p for i in itertools.count(1) if not os.path.lexists(p := final.with_name(f'{final.name}.old-{i}'))
        )
        final.rename(aside)
        logger.warning('%s is a link, or was not written by xtuner: it is called %s now', final, aside.name)
    partial.rename(final)
    flush(final.parent)


def _may_go(folder: Path) -> bool:
    """Whether this is a checkpoint's own folder, which may be removed; a link may lead anywhere."""
    return _has_manifest(folder) and not folder.is_symlink()


def _prune(work_dir: Path, step: int, max_keep: int, keep_best: bool) -> None:
    folders = _up_to(work_dir, step)
    best = _best(folders) if keep_best else None
    if max_keep > 0:
        for old in folders[:-max_keep]:
            if old != best and _may_go(old):
                old.rename(old.with_name(f'{_TRASH}{old.name}'))
    clear_leftovers(work_dir)


def _up_to(work_dir: Path, step: int) -> list[Path]:
    return [folder for folder in list_checkpoints(work_dir) if step_of(folder) <= step]


def _best(folders: list[Path]) -> Path | None:
    losses = [(validation_loss(folder), -step_of(folder), folder) for folder in folders]
    known = [entry for entry in losses if entry[0] is not None]
    return min(known)[2] if known else None


def verify_checkpoint(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: a file is missing, torn or altered; names it.
    """
    for name, (size, digest) in _read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f'{folder}: {name} is missing')
        if path.stat().st_size != size:
            raise CheckpointError(f'{path}: {path.stat().st_size} bytes, {size} were written')
        if _digest(path) != digest:
            raise CheckpointError(f'{path}: its content has changed since it was written')


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file."""
    try:
        manifest = read_object(folder / MANIFEST_FILE, CheckpointError)
        return {str(name): (int(e['bytes']), str(e['sha256'])) for name, e in manifest.items()}
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(f'{folder}: not a whole checkpoint ({MANIFEST_FILE}: {one_line(error)})') from error


def _has_manifest(folder: Path) -> bool:
    """Whether a folder holds a manifest in our form."""
    try:
        return bool(_read_manifest(folder))
    except CheckpointError:
        return False


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
