"""The environment of a run: package versions, devices, and the state of the git repository."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from xtuner import __version__
from xtuner.utils.host_memory import total_bytes

PACKAGES = (
    'torch', 'transformers', 'peft', 'bitsandbytes', 'mmengine', 'datasets', 'safetensors', 'tokenizers',
    'huggingface-hub', 'numpy', 'triton',
)  # fmt: skip
_GIT_TIMEOUT_S = 5


def versions() -> dict[str, str]:
    """Versions of xtuner, Python and the installed packages."""
    result = {'xtuner': __version__, 'python': platform.python_version()}
    for name in PACKAGES:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return result


def devices() -> dict[str, Any]:
    """The machine: system, CPU, cores, memory, and each GPU with its memory in GiB and compute capability."""
    result: dict[str, Any] = {
        'system': f'{platform.system()} {platform.release()}',
        'processor': processor(),
        'cores': available_cores(),
        'memory_gib': host_memory_gib(),
        'gpus': [],
    }
    if torch.cuda.is_available():
        result['cuda'] = torch.version.cuda
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            result['gpus'].append(
                {
                    'name': gpu.name,
                    'memory_gib': round(gpu.total_memory / 2**30, 1),
                    'capability': f'{gpu.major}.{gpu.minor}',
                }
            )
    return result


def processor() -> str:
    """The CPU's name on Linux; elsewhere its architecture."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.machine())


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def host_memory_gib() -> float | None:
    """Memory of the machine, or of the container, in GiB; None if unknown."""
    return round(total_bytes() / 2**30, 1) or None


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit, branch and number of changed files of the git repository that contains a folder; None outside of one.

    Args:
        folder: None: the working directory.
    """
    commit = _git(folder, 'rev-parse', 'HEAD')
    if commit is None:
        return None
    changes = _git(folder, 'status', '--porcelain')
    return {
        'commit': commit,
        'branch': _git(folder, 'rev-parse', '--abbrev-ref', 'HEAD'),
        'num_changed_files': None if changes is None else len(changes.splitlines()),
    }


def _git(folder: Path | None, *words: str) -> str | None:
    """Output of a git command; None if git is not installed, fails, or takes too long."""
    try:
        done = subprocess.run(
            ['git', *words], cwd=folder, capture_output=True, text=True, check=False, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
