"""Writing safetensors files with the permissions that every other file gets."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file; its permissions follow the umask, where the library's own are 0600.

    Raises:
        OSError, SafetensorError: the file system refuses; which of them depends on where it fails.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    path.chmod(mode)


def apply_umask(folder: Path) -> None:
    """Gives the safetensors files that another library wrote in a folder the permissions of a new file."""
    probe = folder / '.permissions'
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.glob('*.safetensors'):
        path.chmod(mode)
