"""Loads a config file and command-line overrides into a checked `TrainConfig`."""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib.util
import sys
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.config.classical import is_classical, translate
from xtuner.config.find import find_config, split_epochs
from xtuner.config.schema import TrainConfig
from xtuner.config.short_types import with_full_types
from xtuner.errors import ConfigError, UsageError, nearest
from xtuner.ranks import is_first_process
from xtuner.utils.escape import printable
from xtuner.utils.fields import Field, shown

# Sections with a callable `type` and its arguments, which are checked against the signature when it is called.
OPEN_SECTIONS = ('optimizer', 'adapter', 'objective')
# Sections that may be a function, which a file may define or import under their name.
_FUNCTION_SECTIONS = ('objective',)
_Section = typing.TypeVar('_Section')


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Loads a shipped config or a file, applies dotted overrides such as `{'dataset.max_length': 512}`, and checks it.

    Raises:
        ConfigError: there is no such config, the file fails to run, a key is unknown (with similar names), or a value
            is invalid; one message lists all such errors, separately for the file and the overrides. Or the file of a
            'file.py:name' is next to the config, and not in the working directory.
    """
    path = find_config(name)
    values = read_file(path)
    if is_classical(values):
        values = _from_classical(values, path)
    epochs = split_epochs(name)[1]
    if epochs and path.stem != Path(name).stem:  # a shipped config by its classical name
        _override(values, 'schedule.max_epochs', epochs)
    file_values = copy.deepcopy(values)
    for key, value in (overrides or {}).items():
        _override(values, key, value)
    faults: list[str] = []
    config = _build(TrainConfig, values, '', faults)
    if faults:
        raise ConfigError(_by_origin(faults, file_values, path))
    for section in OPEN_SECTIONS:
        _check_file(section, getattr(config, section), path)
    return with_full_types(typing.cast(TrainConfig, config))


def section_of(cls: type[_Section], values: Any, where: str) -> _Section:
    """Creates one section from plain values, such as those in a file of a checkpoint; raises ConfigError."""
    faults: list[str] = []
    section = _build(cls, values, where, faults)
    if faults:
        raise ConfigError('; '.join(faults))
    return typing.cast(_Section, section)


def _by_origin(faults: list[str], file_values: dict[str, Any], path: Path) -> str:
    """One line with the errors of the file, prefixed by its name, then those of the command-line options."""
    of_file: list[str] = []
    _build(TrainConfig, file_values, '', of_file)
    of_options = [fault for fault in faults if fault not in of_file]
    parts = {str(path): [fault for fault in faults if fault in of_file], 'command-line options': of_options}
    return '; '.join(f'{origin}: {"; ".join(errors)}' for origin, errors in parts.items() if errors)


def _from_classical(values: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        translated, notes = translate(values)
    except ConfigError as error:
        raise ConfigError(f'{path}: {error}') from None
    if is_first_process():
        for note in notes:
            print(printable(f'classical config: {note}'), file=sys.stderr)
    return translated


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Parses `--cfg-options`: `a.b=1` gives `{'a.b': 1}`; a value that is not a Python literal is text.

    Raises:
        UsageError: an option without `=`.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition('=')
        if not equals or not key:
            raise UsageError(f'--cfg-options takes KEY=VALUE, got {option!r}')
        try:
            parsed[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[key] = text
    return parsed


def read_file(path: Path) -> dict[str, Any]:
    """Runs a config file and returns its top-level names; imports are not executed, but returned as 'module:name'.

    Raises:
        ConfigError: the file has a syntax error or raises an exception; the message has file and line.
    """
    from mmengine.config import Config

    try:
        ast.parse(path.read_text(encoding='utf-8'), filename=str(path))
        config = Config.fromfile(path, lazy_import=True)
    except SyntaxError as error:
        raise ConfigError(f'{path}:{error.lineno}: {error.msg}') from error
    except UnicodeDecodeError as error:
        raise ConfigError(f'{path}: not UTF-8 text ({error.reason} at byte {error.start})') from error
    except Exception as error:
        raise ConfigError(f'{_origin(error, path)}: {error}') from error
    lazy = config._cfg_dict._to_lazy_dict()
    values = _without_lazy(lazy, path)
    # Names with a leading underscore are helpers of the file, and so are its functions, modules and imports.
    helpers = (types.FunctionType, types.ModuleType)  # mmengine does import modules of the standard library
    hidden = {*config._imported_names, *(k for k, v in lazy.items() if isinstance(v, helpers))} - {*_FUNCTION_SECTIONS}
    return {k: v for k, v in values.items() if k not in hidden and not k.startswith('_')}


def _without_lazy(value: Any, path: Path) -> Any:
    """Replaces imports and functions of a config file by 'module:name' or 'file.py:name', for `xtuner.registry`."""
    from mmengine.config.lazy import LazyAttr, LazyObject

    if isinstance(value, LazyObject):
        return f'{_module_or_file(value.module, path)}:{value}' if value._imported else value.module
    if isinstance(value, LazyAttr):
        return f'{_module_or_file(value.module, path)}:{value.name}'
    if isinstance(value, types.FunctionType):
        return f'{Path(value.__code__.co_filename).resolve()}:{value.__qualname__}'
    if isinstance(value, dict):
        return {k: _without_lazy(v, path) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_lazy(v, path) for v in value)
    return value


def _module_or_file(module: str, path: Path) -> str:
    """The name of an installed module, or the path of a module in the folder of the config."""
    file = path.resolve().parent / f'{module}.py'
    is_installed = '.' in module or not file.is_file() or importlib.util.find_spec(module) is not None
    return module if is_installed else str(file)


def _check_file(where: str, section: Any, path: Path) -> None:
    """Raises ConfigError for a 'file.py:name' that is next to the config, but not where the command runs."""
    kind = section.get('type') if isinstance(section, Mapping) else section
    file, _, name = kind.rpartition(':') if isinstance(kind, str) else ('', '', '')
    if file.endswith('.py') and not Path(file).is_file() and (path.parent / file).is_file():
        raise ConfigError(
            f'`{where}`: there is no file {file!r} in {Path.cwd()}, where the command runs; for the one next to the '
            f"config write '{path.parent / file}:{name}'"
        )


def _origin(error: BaseException, path: Path) -> str:
    """`file:line` of an error in the code of the config, also if mmengine wrapped the error."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.filename.endswith('.py') and (
                'configs' in Path(frame.filename).parts or frame.filename == str(path)
            ):
                return f'{frame.filename}:{frame.lineno}'
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(path)


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split('.')
    here: Any = values
    for section in sections:
        if here.get(section) is None:
            here[section] = {}
        elif section in _FUNCTION_SECTIONS and isinstance(here[section], str):
            here[section] = {'type': here[section]}
        here = here[section]
        if not isinstance(here, dict):
            raise ConfigError(f'`{key}` cannot be set: `{section}` is a {type(here).__name__}, not a section')
    here[last] = value


def _build(cls: type, values: Any, where: str, faults: list[str]) -> Any:
    """Creates a dataclass from a mapping and appends its errors to `faults`."""
    if not isinstance(values, Mapping):
        faults.append(f'`{where}` must be a dict, got {shown(values)}')
        return None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    faults.extend(_unknown(name, where, fields) for name in values if name not in fields)
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for name, field in fields.items():
        path = f'{where}.{name}' if where else name
        if name in values:
            arguments[name] = _value(hints[name], values[name], path, field, faults)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            faults.append(f'`{path}` is missing: {field.metadata["text"]}')
    if faults:
        return None
    try:
        return cls(**arguments)
    except ConfigError as error:  # from a check of several fields
        faults.append(str(error))
        return None


def _unknown(name: str, where: str, fields: Mapping[str, Any]) -> str:
    path = f'{where}.{name}' if where else name
    hint = nearest(name, fields) or f'; known: {", ".join(fields)}'
    helper = '' if where else ' (names of helper variables must begin with an underscore)'
    return f'unknown key `{path}`{hint}{helper if not nearest(name, fields) else ""}'


def _value(hint: Any, value: Any, path: str, field: dataclasses.Field[Any], faults: list[str]) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    section: Any = next((k for k in kinds if dataclasses.is_dataclass(k)), None)
    if value is None and type(None) in kinds:
        return None
    if section is not None:
        return value if isinstance(value, section) else _build(section, value, path, faults)
    limits = {name: field.metadata[name] for name in ('minimum', 'maximum', 'allowed')}
    fault = Field(hint, **limits).fault(path, value)
    if fault:
        faults.append(fault)
    elif path in OPEN_SECTIONS and isinstance(value, Mapping) and 'type' not in value:
        faults.append(f'`{path}` needs a `type`: {field.metadata["text"]}')
    return value
