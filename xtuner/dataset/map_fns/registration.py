"""Registration, lookup and detection of map functions."""

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
"""Columns that hold whole conversations; an empty one next to a filled one is ignored by detection."""


def map_fn(*columns: str, detect: Callable[[Mapping[str, Any]], bool] | None = None) -> Callable[[MapFn], MapFn]:
    """Decorator that registers `<name>_map_fn` as `<name>` and under its full name.

    Args:
        columns: The columns that the function requires.
        detect: Whether a record has this format; None: if it has all the columns. Formats that share their columns with
            others are never detected: `detect=never`.
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
    """A `detect` for formats that share their columns with another."""
    return False


def no_longer(record: Mapping[str, Any]) -> bool:
    """A `detect` for formats that the first releases detected although they add their own text to the record's."""
    return False


def first_detected_map_fn(record: Any) -> str:
    """Name of the map function that the first releases detected, '' for none; runs begun with them keep it."""
    functions = formats() if isinstance(record, Mapping) else {}
    functions = {name: function for name, function in functions.items() if not function.__module__.endswith('.plain')}
    return next((name for name, function in functions.items() if _detected_first(function, record)), '')


def _detected_first(function: MapFn, record: Mapping[str, Any]) -> bool:
    detect, columns = getattr(function, 'detect', never), getattr(function, 'columns', ())
    return detect(record) or (detect is no_longer and all(column in record for column in columns))


def formats() -> dict[str, MapFn]:
    """Returns all registered map functions by short name, the most specific first, the order of detection."""
    by_name = {name: function for name, function in _registry().items() if not name.endswith(_SUFFIX)}
    return dict(sorted(by_name.items(), key=lambda item: -len(getattr(item[1], 'columns', ()))))


def resolve_map_fn(value: Any) -> MapFn:
    """Returns the map function that a config names.

    Args:
        value: A registered name (`alpaca` or `alpaca_map_fn`), a function, `module:function` or `file.py:function`.

    Raises:
        ConfigError: The function does not exist.
    """
    if callable(value):
        return value
    if not isinstance(value, str):
        raise ConfigError(f'`dataset.map_fn` must be a name, a function or `module:function`, got {value!r}')
    if ':' in value:
        return imported(value, '`dataset.map_fn`')
    function = _registry().get(value)
    if function is None:
        known = sorted(formats())
        raise ConfigError(f'`dataset.map_fn` is {value!r}, which is not a map function{nearest(value, known)}; known: '
                          f'{", ".join(known)}; name your own function as `module:function`')  # fmt: skip
    return function


def detect_map_fn(record: Any, origin: str) -> MapFn:
    """Returns the map function for the format of `record`.

    Raises:
        ConfigError: No known format matches; names the record's columns and the nearest format.
    """
    if isinstance(record, Mapping):
        full = {key for key in TURNS if not is_empty(record.get(key))}
        visible = {key: value for key, value in record.items() if not full or key in full or key not in TURNS}
        for function in formats().values():
            if getattr(function, 'detect', never)(visible):
                return function
        columns = sorted(map(str, record))
    else:
        columns = [type(record).__name__]
    if preference := {'chosen', 'rejected'} & set(columns):
        raise ConfigError(f'{origin}: the column {min(preference)} belongs to preference data, which is not supported; '
                          'use conversations, or your own map function as `module:function`')  # fmt: skip
    raise ConfigError(f'{origin}: no known format has the columns {", ".join(columns)}; {nearest_format(columns)}; '
                      'name a format with `dataset.map_fn` (`xtuner list-dataset-format` lists them), or your own '
                      'map function as `module:function`')  # fmt: skip


def nearest_format(columns: Iterable[str]) -> str:
    """Returns a hint such as "the nearest is `alpaca`, which needs instruction, output"."""
    have = set(columns)
    functions = {name: getattr(function, 'columns', ()) for name, function in formats().items()}
    name = max(functions, key=lambda n: (len(have & set(functions[n])), -len(set(functions[n]) - have)))
    return f'the nearest is `{name}`, which needs {", ".join(functions[name]) or "no column"}'


def _registry() -> dict[str, MapFn]:
    importlib.import_module('xtuner.dataset.map_fns')
    return dict(MAP_FUNC.module_dict)
