"""Files: JSON of other people read within bounds, and content that is replaced atomically.

A file of others may be a named pipe, larger than the memory, nested deeper than Python's stack, or hold the same key
twice: each is one line of error that names the file. What its fields may hold is checked by `xtuner.utils.fields`.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xtuner.errors import XTunerError

MAX_BYTES = 64 * 2**20
"""The largest settings that are read. An index of 100,000 tensors has 10 MB."""
MAX_DEPTH = 64
"""Objects and lists within each other. Published settings have fewer than 10."""


def read_object(
    path: Path, error: type[XTunerError], *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        path: The file.
        error: What is raised.
        max_bytes: The largest file that is read.
        max_depth: How deep objects and lists may lie within each other.

    Raises:
        XTunerError: of the given class: no regular file, too large, not UTF-8, not JSON, no object, nested too deeply,
            or a key stands twice with different values.
    """
    check_regular(path, error)
    try:
        with path.open('rb') as file:
            raw = file.read(max_bytes + 1)
        if len(raw) > max_bytes:
            raise error(f'{path} cannot be read: it is larger than {max_bytes >> 20} MiB')
        return parse_object(raw, max_depth=max_depth)
    except OSError as problem:
        raise error(f'{path} cannot be read: {problem.strerror or problem}') from problem
    except ValueError as problem:
        if isinstance(problem, XTunerError):
            raise
        raise error(f'{path} cannot be read: {problem}') from problem


def parse_object(raw: bytes, *, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes; raises ValueError as `read_object` does."""
    try:
        content = json.loads(raw.decode('utf-8'), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(_TOO_DEEP.format(max_depth)) from None
    if not isinstance(content, dict):
        raise ValueError('expected a JSON object')
    _check_depth(content, max_depth)
    return content


def expanded(path: str | Path) -> Path:
    """A path with the home folder in place of `~`; as it is where it names no user's: `~.jsonl` is a file."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def check_regular(path: Path, error: type[XTunerError], advice: str = '') -> os.stat_result:
    """Returns the stat of a file; raises `error`, with `advice`, for what is no regular file.

    It is called before a file is opened: a named pipe would block for good.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
        reason = getattr(problem, 'strerror', None) or problem
        link = f'it is a link to {os.readlink(path)}, which cannot be followed: ' if os.path.islink(path) else ''
        raise error(f'{path} cannot be read: {link}{reason}') from problem
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), 'no regular file')
        raise error(f'{path} cannot be read: it is {kind}{advice}')
    return found


def write_atomically(path: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Writes a file under a temporary name beside `path` and renames it: readers see all of it or what was before.

    Args:
        path: The file; what is there is replaced.
        content: Text is written in UTF-8.
        durable: Flush the file before the rename and its folder afterwards, so that a power failure keeps one of both.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    partial = path.with_name(f'{path.name}.partial')
    partial.write_bytes(content.encode('utf-8') if isinstance(content, str) else content)
    if durable:
        flush(partial)
    os.replace(partial, path)
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Makes the disk keep a file's content, or the names in a folder, before what follows."""
    if path.is_dir() and not _POSIX:  # elsewhere folders cannot be opened, and need not be
        return
    descriptor = os.open(path, os.O_RDONLY if _POSIX else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_POSIX = os.name == 'posix'
_KINDS = {
    stat.S_IFDIR: 'a folder', stat.S_IFIFO: 'a named pipe', stat.S_IFSOCK: 'a socket', stat.S_IFCHR: 'a device',
    stat.S_IFBLK: 'a device',
}  # fmt: skip
_TOO_DEEP = 'it is nested deeper than {} levels'


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; where a key stands twice, readers differ in which value they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        for key, value in pairs:
            if content[key] != value:
                raise ValueError(f'the key {key[:64]!r} stands twice, with different values')
    return content


def _check_depth(content: Any, most: int) -> None:
    """Level by level, so that no depth ends this process's stack."""
    level: list[Any] = [content]
    for _ in range(most):
        level = [item for value in level for item in _items(value)]
        if not level:
            return
    raise ValueError(_TOO_DEEP.format(most))


def _items(value: Any) -> Iterable[Any]:
    """The objects and lists in an object or a list."""
    inner = value.values() if isinstance(value, dict) else value
    return [item for item in inner if isinstance(item, (dict, list))]
