"""Map functions: one raw record in, one conversation (or a list of them, or None to skip the record) out.

One file per format. To add one, add a file whose `<name>_map_fn(example)` is decorated with `@map_fn(...)`.
"""

from __future__ import annotations

import importlib
import pkgutil

from xtuner.aliases import former_names
from xtuner.dataset.map_fns.registration import detect_map_fn, formats, map_fn, nearest_format, resolve_map_fn

__all__ = ['detect_map_fn', 'formats', 'map_fn', 'nearest_format', 'resolve_map_fn']

for _info in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f'{__name__}.{_info.name}')
    _functions = {name: value for name, value in vars(_module).items() if name.endswith('_map_fn') and callable(value)}
    globals().update({name: value for name, value in _functions.items() if value.__module__ == _module.__name__})

__getattr__ = former_names(__name__)
