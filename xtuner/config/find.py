"""Finds config files by name. Imports no heavy library, so that `xtuner list-cfg` is fast."""

from __future__ import annotations

import re
from pathlib import Path

import xtuner
from xtuner.errors import ConfigError, nearest


def shipped_folder(name: str) -> Path:
    """The folder `configs` or `tools`, inside the installed package or at the top of a source checkout."""
    package = Path(xtuner.__file__).parent
    installed, checkout = package / name, package.parent / name
    return installed if installed.is_dir() else checkout


def config_root() -> Path:
    """The folder of shipped configs."""
    return shipped_folder('configs')


def list_configs(pattern: str = '') -> dict[str, Path]:
    """Names and files of the shipped configs whose name contains `pattern`, sorted, without the fragments."""
    files = (f for f in config_root().rglob('*.py') if '_base_' not in f.parts)
    return {f.stem: f for f in sorted(files, key=lambda f: f.stem) if split_epochs(pattern)[0] in f.stem}


def split_epochs(name: str) -> tuple[str, int | None]:
    """Splits a classical config name into name and epochs: 'x_e3' gives 'x' and 3."""
    match = re.fullmatch(r'(.+)_e([1-9]\d{0,3})', name)
    return (match[1], int(match[2])) if match else (name, None)


def find_config(name: str) -> Path:
    """Finds the file of a shipped config, such as `internlm_7b_qlora_oasst1`, or of a path to a .py file.

    A classical name such as `internlm_7b_qlora_oasst1_e3` is the current name with the epochs at its end.

    Raises:
        ConfigError: there is no such config; the message has the most similar shipped names.
    """
    shipped = list_configs()
    if (current_name := split_epochs(name)[0]) in shipped:
        return shipped[current_name]
    path = Path(name)
    if path.suffix == '.py' and path.is_file():
        return path
    if name and path.exists():
        raise ConfigError(f'{name!r} is not a config: give a shipped name (`xtuner list-cfg`) or a .py file')
    hint = nearest(path.stem, shipped) or '; `xtuner list-cfg` lists all'
    kind = 'config file' if path.suffix == '.py' else 'config'
    raise ConfigError(f'no {kind} {name!r}{hint}')
