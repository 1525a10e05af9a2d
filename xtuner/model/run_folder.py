"""Resolves what a user names to a folder: a run's work folder, or its file `last`, stands for a checkpoint.

`work_dirs/x` and `work_dirs/x/last` stand for the checkpoint that the file `last` names, `work_dirs/x/best` for the one
that `best` names; any other path stands for itself.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from xtuner.errors import CheckpointError, ModelError
from xtuner.utils.files import read_object

logger = logging.getLogger('xtuner')

LAST_FILE, BEST_FILE = 'last', 'best'
"""Files of a work folder: the name of the newest checkpoint, and of the one with the lowest validation loss."""
ADAPTER_CONFIG = 'adapter_config.json'
_CHECKPOINT = re.compile(r'checkpoint-\d+')


def resolve_checkpoint(path: Path) -> Path:
    """Returns the checkpoint that a path stands for; a path outside a run is returned unchanged.

    Raises:
        CheckpointError: The file `last` or `best` cannot be read, or names a checkpoint that does not exist.
    """
    pointer = path if path.name in (LAST_FILE, BEST_FILE) and path.is_file() else path / LAST_FILE
    if not pointer.is_file() or (path / ADAPTER_CONFIG).is_file() or (path / 'config.json').is_file():
        return path
    try:
        name = pointer.read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f'{pointer} cannot be read ({error}); name the checkpoint itself') from error
    folder = pointer.parent / name
    if not _CHECKPOINT.fullmatch(name) or not folder.is_dir():
        raise CheckpointError(f'{pointer} names {name[:80]!r}, but there is no such checkpoint; name an existing one')
    logger.info('%s: using its checkpoint %s', path, name)
    return folder


def work_folder(path: Path) -> Path:
    """The work folder of a run, given the folder, one of its checkpoints or its file `last`."""
    named = path.is_file() and path.name in (LAST_FILE, BEST_FILE)
    return path.parent if named or _CHECKPOINT.fullmatch(path.name) else path


def model_folder(folder: Path) -> Path:
    """Returns a model's folder: the folder itself, or the last checkpoint of a full fine-tuning run.

    Raises:
        ModelError: It contains an adapter, not a model; names the adapter's base.
        CheckpointError: as `resolve_checkpoint`.
    """
    resolved = resolve_checkpoint(folder)
    if (resolved / 'config.json').is_file() or not (resolved / ADAPTER_CONFIG).is_file():
        return resolved
    raise ModelError(f'{folder} contains an adapter, not a model; use its base as the model{_base_of(resolved)} and '
                     'this folder as the adapter')  # fmt: skip


def _base_of(adapter: Path) -> str:
    """' (BASE)' as named in the adapter's files, or ''."""
    for file, key in (('xtuner.json', 'base'), (ADAPTER_CONFIG, 'base_model_name_or_path')):
        try:
            name = read_object(adapter / file, CheckpointError)[key]
        except (CheckpointError, KeyError):
            continue
        if isinstance(name, str) and name:
            return f' ({name[:200]!r})'
    return ''
