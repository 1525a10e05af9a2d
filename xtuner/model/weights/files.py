"""Writes safetensors files with the permissions of ordinary new files."""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with permissions by the umask; the library's own are 0600.

    Raises:
        OSError, SafetensorError: Writing fails; the type depends on where it fails.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    path.chmod(mode)


def apply_umask(folder: Path) -> None:
    """Sets the permissions of safetensors files written by another library to those of a new file."""
    probe = folder / '.permissions'
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.glob('*.safetensors'):
        path.chmod(mode)
