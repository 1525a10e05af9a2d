"""Host memory that this process may still allocate, within the limits of its container.

The minimum of what the system has available without swapping, including reclaimable page cache, and of what each
control group of this process has left, from its own up to the root.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path('/')
# Files of a control group's memory controller, by cgroup version.
_V2 = (('memory.max', 'memory.high'), 'memory.current', ('inactive_file', 'active_file', 'slab_reclaimable'))
_V1 = (('memory.limit_in_bytes',), 'memory.usage_in_bytes', ('total_inactive_file', 'total_active_file'))


@dataclass(frozen=True)
class _Group:
    """A control group's folder and the names of its files."""

    folder: Path
    limits: tuple[str, ...]
    usage: str
    cache: tuple[str, ...]

    def limit(self) -> int | None:
        """Memory limit in bytes; None: no limit."""
        limits = [_number(self.folder / name) for name in self.limits]
        return min((n for n in limits if n is not None), default=None)

    def left(self) -> int | None:
        """Bytes left within the limit, counting reclaimable page cache as free; None: no limit."""
        limit, used = self.limit(), _number(self.folder / self.usage)
        if limit is None or used is None:
            return None
        counts = dict(line.split()[:2] for line in _lines(self.folder / 'memory.stat') if len(line.split()) > 1)
        cached = sum(int(counts[name]) for name in self.cache if counts.get(name, '').isdigit())
        return max(0, limit - used + min(cached, used))


def available_bytes(root: Path = _ROOT) -> int:
    """Bytes that this process may still allocate.

    Args:
        root: Contains `proc` and the control groups' mount points.
    """
    left = [n for group in _groups(root) if (n := group.left()) is not None]
    return min([_system('MemAvailable', root), *left])


def total_bytes(root: Path = _ROOT) -> int:
    """Total memory in bytes of the machine, or of the container."""
    limits = [n for group in _groups(root) if (n := group.limit()) is not None]
    return min([_system('MemTotal', root), *limits])


def _system(name: str, root: Path) -> int:
    """A line of `/proc/meminfo` in bytes; psutil's value on macOS and Windows."""
    for line in _lines(root / 'proc/meminfo'):
        words = line.split()
        if words[:1] == [f'{name}:'] and len(words) > 1 and words[1].isdigit():
            return int(words[1]) * 1024
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available if name == 'MemAvailable' else memory.total)


def _groups(root: Path) -> Iterator[_Group]:
    """The control groups of this process that may limit memory, its own first."""
    if root == _ROOT and sys.platform != 'linux':
        return
    paths = dict(_memberships(root))
    for kind, top, mount in _mounts(root):
        path = paths.get(kind)
        if path is None:
            continue
        folder = mount / (PurePosixPath(path).relative_to(top) if _is_inside(path, top) else path.lstrip('/'))
        if '..' in folder.parts or not folder.is_dir():  # a path of the host, of which a container sees only a part
            folder = mount
        while True:
            yield _Group(folder, *(_V2 if kind == 'v2' else _V1))
            if folder == mount:
                break
            folder = folder.parent


def _is_inside(path: str, top: str) -> bool:
    return PurePosixPath(path).is_relative_to(top)


def _memberships(root: Path) -> Iterator[tuple[str, str]]:
    """Yields hierarchy ('v2', or 'v1' for its memory controller) and this process's path in it."""
    for line in _lines(root / 'proc/self/cgroup'):
        number, controllers, path = [*line.split(':', 2), '', ''][:3]
        if number == '0' and not controllers:
            yield 'v2', path
        elif 'memory' in controllers.split(','):
            yield 'v1', path


def _mounts(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Yields kind, mounted path of the hierarchy, and mount point of each hierarchy that may control memory."""
    for line in _lines(root / 'proc/self/mountinfo'):
        before, _, after = line.partition(' - ')
        fields, options = before.split(), after.split()
        if len(fields) < 5 or not options:
            continue
        controls_memory = 'memory' in options[-1].split(',')
        if options[0] == 'cgroup2' or (options[0] == 'cgroup' and controls_memory):
            yield 'v2' if options[0] == 'cgroup2' else 'v1', fields[3], root / fields[4].lstrip('/')


def _number(path: Path) -> int | None:
    """A file's number; None if there is none, or it contains 'max'."""
    text = ''.join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        return []
