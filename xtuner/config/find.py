"""Config names to files. Imports nothing heavy: `xtuner list-cfg` runs on this alone."""

from __future__ import annotations

import re
from pathlib import Path

import xtuner
from xtuner.errors import ConfigError, nearest


def shipped_folder(name: str) -> Path:
    """`configs` or `tools`: inside the installed package, or at the top of a source checkout."""
    package = Path(xtuner.__file__).parent
    installed, checkout = package / name, package.parent / name
    return installed if installed.is_dir() else checkout


def config_root() -> Path:
    """The folder of shipped configs."""
    return shipped_folder('configs')


def list_configs(pattern: str = '') -> dict[str, Path]:
    """Names and files of the shipped configs whose name contains `pattern`, sorted; fragments are left out."""
    files = (f for f in config_root().rglob('*.py') if '_base_' not in f.parts)
    return {f.stem: f for f in sorted(files, key=lambda f: f.stem) if split_epochs(pattern)[0] in f.stem}


def split_epochs(name: str) -> tuple[str, int | None]:
    """Parts a shipped config's classical name from the epochs at its end: 'x_e3' is 'x', trained for 3."""
    found = re.fullmatch(r'(.+)_e([1-9]\d{0,3})', name)
    return (found[1], int(found[2])) if found else (name, None)


def find_config(name: str) -> Path:
    """The file of a shipped name such as `internlm_7b_qlora_oasst1`, or of a path to a .py file.

    A name of classical xtuner, `internlm_7b_qlora_oasst1_e3`, is today's with the epochs at its end (`load_config`).

    Raises:
        ConfigError: there is neither; the message names the nearest shipped configs.
    """
    shipped = list_configs()
    if (known := split_epochs(name)[0]) in shipped:
        return shipped[known]
    path = Path(name)
    if path.suffix == '.py' and path.is_file():
        return path
    if name and path.exists():
        raise ConfigError(f'{name!r} is no config: a config is a shipped name (`xtuner list-cfg`) or a .py file')
    hint = nearest(path.stem, shipped) or '; `xtuner list-cfg` shows all'
    kind = 'config file' if path.suffix == '.py' else 'config'
    raise ConfigError(f'no {kind} {name!r}{hint}')
