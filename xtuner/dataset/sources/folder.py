"""Data files of a folder, and a note for each group of files that are skipped."""

from __future__ import annotations

import os
import re
from pathlib import Path

from xtuner.dataset.sources.files import COMPRESSED, is_data_file, known_kinds
from xtuner.errors import DataError

_HELD_OUT = frozenset({'test', 'tests', 'testing', 'valid', 'validation', 'val', 'dev', 'eval', 'evaluation'})
_MAX_NAMED = 5


def data_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Returns the files of a folder to train on, by name, and notes about those that are skipped.

    Hidden files and folders are skipped. A test or validation split next to other data is not trained; if the folder
    holds nothing else, it is.

    Raises:
        DataError: No file is left, or a folder cannot be listed.
    """
    visible, hidden = _walk(folder)
    files = [file for file in visible if is_data_file(file) and file.is_file()]
    names = set(files)
    twins = [file for file in files if file.suffix.lower() in COMPRESSED and file.with_suffix('') in names]
    single = sorted(names.difference(twins))
    train = [file for file in single if not is_held_out(file.relative_to(folder))]
    alone = [] if train else single
    train = train or single
    if not train:
        raise DataError(
            f'{folder}: the folder contains no data file; supported: {known_kinds()}{_but(folder, visible + hidden)}'
        )
    held_out = sorted(names.difference(train, twins))
    others = sorted(set(visible) - names)
    notes = [
        _note(
            folder, held_out, 'not trained because {} a test or validation split; name {} as a source to train on {}'
        ),
        _note(folder, alone, 'used although {} a test or validation split, since the folder contains nothing else'),
        _note(folder, twins, 'not read because {} also there uncompressed'),
        _note(folder, others, 'not read because {} not in a supported format'),
        _note(folder, hidden, 'not read because {} hidden'),
    ]
    return train, [note for note in notes if note]


def is_held_out(path: Path) -> bool:
    """Whether a file is a test or validation split, by its name or that of a parent folder."""
    parts = [re.split(r'[^a-z]+', part.lower()) for part in (*path.parts[:-1], path.name.partition('.')[0])]
    return any(
        not {'train', 'training'} & set(words) and bool({words[0], next(filter(None, reversed(words)), '')} & _HELD_OUT)
        for words in parts
    )


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the visible files below a folder, and its hidden files and folders, which are not entered."""
    visible: list[Path] = []
    hidden: list[Path] = []
    for where, folders, files in os.walk(folder, onerror=_refuse):
        for names, is_folder in ((folders, True), (files, False)):
            hidden += [Path(where, name) for name in names if name.startswith('.')]
            names[:] = [name for name in names if not name.startswith('.')]
            links = [name for name in names if is_folder and Path(where, name).is_symlink()]  # not followed
            visible += [Path(where, name) for name in (links if is_folder else names)]
    return sorted(visible), sorted(hidden)


def _refuse(error: OSError) -> None:
    raise DataError(f'{error.filename}: the folder cannot be listed: {error.strerror}')


def _note(folder: Path, files: list[Path], text: str) -> str:
    if not files:
        return ''
    one = len(files) == 1
    shown = text.format('it is' if one else 'they are', 'it' if one else 'them', 'it' if one else 'them')
    return f'{folder}: {len(files):,} file{"" if one else "s"} {shown}: {_names(folder, files)}'


def _but(folder: Path, files: list[Path]) -> str:
    return f'; it contains {_names(folder, files)}' if files else ''


def _names(folder: Path, files: list[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files[:_MAX_NAMED]]
    return ', '.join(names) + (f' and {len(files) - _MAX_NAMED:,} more' if len(files) > _MAX_NAMED else '')
