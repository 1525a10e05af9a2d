"""How a map function is registered, looked up and detected."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xtuner.dataset.mapping.unread_fields import is_empty
from xtuner.errors import ConfigError, nearest
from xtuner.registry import MAP_FUNC, imported

MapFn = Callable[[dict[str, Any]], Any]
_SUFFIX = '_map_fn'
TURNS = ('messages', 'conversations', 'conversation')
"""Columns of whole conversations; an empty one beside another does not tell the format."""


def map_fn(*columns: str, detect: Callable[[Mapping[str, Any]], bool] | None = None) -> Callable[[MapFn], MapFn]:
    """Registers `<name>_map_fn` as `<name>` and under its own name.

    Args:
        columns: The columns that the function reads and cannot do without.
        detect: Whether a record is of this format, told from the record itself; None: where it has all the columns.
            Formats that share their columns with others are never detected: `detect=never`.
    """

    def register(function: MapFn) -> MapFn:
        """Adds the function to the registry under both names, with its columns and its detector."""
        name = function.__name__
        function.columns = columns  # type: ignore[attr-defined]
        function.detect = detect or (lambda record: all(column in record for column in columns))  # type: ignore[attr-defined]
        MAP_FUNC.register_module(name=[name.removesuffix(_SUFFIX), name], module=function)
        return function

    return register


def never(record: Mapping[str, Any]) -> bool:
    """The `detect` of a format that shares its columns with another."""
    return False


def no_longer(record: Mapping[str, Any]) -> bool:
    """The `detect` of a format that the first releases detected, though it adds text of its own to the record's."""
    return False


def first_detected_map_fn(record: Any) -> str:
    """The name of the map function that the first releases detected; '' for none. Runs begun with them go on so."""
    found = formats() if isinstance(record, Mapping) else {}
    known = {name: function for name, function in found.items() if not function.__module__.endswith('.plain')}
    return next((name for name, function in known.items() if _detected_first(function, record)), '')


def _detected_first(function: MapFn, record: Mapping[str, Any]) -> bool:
    detect, columns = getattr(function, 'detect', never), getattr(function, 'columns', ())
    return detect(record) or (detect is no_longer and all(column in record for column in columns))


def formats() -> dict[str, MapFn]:
    """Returns all registered map functions by short name, the more specific before the less specific for detection."""
    short = {name: function for name, function in _registry().items() if not name.endswith(_SUFFIX)}
    return dict(sorted(short.items(), key=lambda item: -len(getattr(item[1], 'columns', ()))))


def resolve_map_fn(value: Any) -> MapFn:
    """Returns the map function that a config names.

    Args:
        value: A registered name (`alpaca` or `alpaca_map_fn`), a function, `module:function` or `file.py:function`.

    Raises:
        ConfigError: Where there is no such function.
    """
    if callable(value):
        return value
    if not isinstance(value, str):
        raise ConfigError(f'`dataset.map_fn` must be a name, a function or `module:function`, got {value!r}')
    if ':' in value:
        return imported(value, '`dataset.map_fn`')
    found = _registry().get(value)
    if found is None:
        known = sorted(formats())
        raise ConfigError(f'`dataset.map_fn` is {value!r}, which is no map function{nearest(value, known)}; known: '
                          f'{", ".join(known)}; a function of your own is named `module:function`')  # fmt: skip
    return found


def detect_map_fn(record: Any, origin: str) -> MapFn:
    """Returns the map function whose format `record` has.

    Raises:
        ConfigError: Where none or a record of no known format is found; names the columns found and the nearest format.
    """
    if isinstance(record, Mapping):
        full = {key for key in TURNS if not is_empty(record.get(key))}
        told = {key: value for key, value in record.items() if not full or key in full or key not in TURNS}
        for function in formats().values():
            if getattr(function, 'detect', never)(told):
                return function
        found = sorted(map(str, record))
    else:
        found = [type(record).__name__]
    if preference := {'chosen', 'rejected'} & set(found):
        raise ConfigError(f'{origin}: the column {min(preference)} is of preference data, which is not trained here; '
                          'give conversations, or a function of your own as `module:function`')  # fmt: skip
    raise ConfigError(f'{origin}: no known format has the columns {", ".join(found)}; {nearest_format(found)}; '
                      'name one with `dataset.map_fn` (`xtuner list-dataset-format` shows them), or a function of '
                      'your own as `module:function`')  # fmt: skip


def nearest_format(columns: Iterable[str]) -> str:
    """Returns a hint such as "the nearest is `alpaca`, which needs instruction, output"."""
    have = set(columns)
    functions = {name: getattr(function, 'columns', ()) for name, function in formats().items()}
    name = max(functions, key=lambda n: (len(have & set(functions[n])), -len(set(functions[n]) - have)))
    return f'the nearest is `{name}`, which needs {", ".join(functions[name]) or "no column"}'


def _registry() -> dict[str, MapFn]:
    importlib.import_module('xtuner.dataset.map_fns')
    return dict(MAP_FUNC.module_dict)
