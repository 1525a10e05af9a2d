"""The registries, and the resolution of a `type` in a config to the object that it names.

- `BUILDER`: short names for anything that a `dict(type=...)` may build.
- `MAP_FUNC`: functions that turn a raw record into a conversation (`xtuner.dataset.map_fns`).
- `TEMPLATES`: prompt templates (`xtuner.dataset.templates.builtin`).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

from xtuner.errors import ConfigError, nearest, one_line
from xtuner.utils.fields import shown

BUILDER = Registry('builder')
MAP_FUNC = Registry('map function', locations=['xtuner.dataset.map_fns'])
TEMPLATES = Registry('template', locations=['xtuner.dataset.templates.builtin'])


def registered(registry: Registry, name: Any) -> Any:
    """Returns the object registered under a name; None if there is none.

    mmengine's own `Registry.get` imports the module of a dotted name. A name may come from an untrusted file, such as
    an adapter's `xtuner.json`, so nothing is imported here.

    Args:
        registry: One of the registries above; the modules that fill it must have been imported.
        name: Any value; only strings can be registered.
    """
    return registry.module_dict.get(name) if isinstance(name, str) else None


def resolve(target: Any) -> Callable[..., Any]:
    """Resolves a `type` to a callable: a callable, a registered name, 'module:name' or 'file.py:name'.

    Raises:
        ConfigError: The module or the name does not exist, or is not callable.
    """
    if callable(target):
        return target
    if not isinstance(target, str):
        raise ConfigError(f'`type` must be a class, a function or text such as "peft:LoraConfig", got {shown(target)}')
    if ':' not in target:
        builder = registered(BUILDER, target)
        if builder is None and '.' in target:  # a config is trusted and may name code: 'torch.optim.AdamW'
            builder = _by_dotted_name(target)
        if not callable(builder):
            raise ConfigError(
                f'no registered type {target!r}{nearest(target, BUILDER.module_dict)}; '
                'a type that is not registered is written "module:name"'
            )
        return builder
    return imported(target, 'type')


def _by_dotted_name(target: str) -> Any:
    try:
        return get_object_from_string(target)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(f'type {target!r} cannot be imported: {type(error).__name__}: {error}') from error


def imported(target: str, what: str) -> Callable[..., Any]:
    """Imports the callable named by 'module:name' or 'file.py:name'.

    Args:
        target: The name; a module must be importable, a file is run once as a module.
        what: Where the name comes from, for the error message.

    Raises:
        ConfigError: The module, file or name does not exist, fails to run, or is not callable.
    """
    module_name, _, name = target.rpartition(':')
    if module_name.endswith('.py') and not (file := Path(module_name)).is_file():
        where = '' if file.is_absolute() else f' in {Path.cwd()}, where the command runs'
        raise ConfigError(f'{what} {target!r} cannot be imported: there is no file {module_name!r}{where}')
    try:
        module = _module_of(Path(module_name)) if module_name.endswith('.py') else importlib.import_module(module_name)
        value = getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f'{what} {target!r} cannot be imported: module {module_name!r} has no {name!r}') from error
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(f'{what} {target!r} cannot be imported: {type(error).__name__}: {error}; a module must be '
                          'importable from where the command runs (PYTHONPATH), or be next to the config; a file must '
                          'run by itself') from error  # fmt: skip
    if not callable(value):
        raise ConfigError(f'{what} {target!r} is a {type(value).__name__}, which is not callable')
    return value


def _module_of(file: Path) -> ModuleType:
    """Runs a file as a module; cached."""
    file = file.resolve()
    name = f'xtuner_file_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}'
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


def reference(target: Any) -> str:
    """The text 'module:name' (or 'file.py:name') that `resolve` turns into `target` again."""
    if isinstance(target, str):
        return target
    file = getattr(sys.modules.get(target.__module__), '__file__', None)
    module = file if file and target.__module__.startswith('xtuner_file_') else target.__module__
    return f'{module}:{target.__qualname__}'


def check_arguments(section: Mapping[str, Any], where: str, *, given: tuple[str, ...] = ()) -> None:
    """Checks that the keys of a `dict(type=..., ...)` are arguments of its type, without calling it.

    Args:
        section: The mapping from a config.
        where: The section's name, for the message.
        given: Names of leading arguments that the caller will add itself.

    Raises:
        ConfigError: Unknown or missing argument; names the nearest one.
    """
    if not isinstance(section, Mapping) or 'type' not in section:
        raise ConfigError(f'`{where}` must be a dict with a `type`, got {shown(section)}')
    target = resolve(section['type'])
    signature = inspect.signature(target)
    parameters = signature.parameters
    keys = {k: v for k, v in section.items() if k != 'type'}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in keys:
            if key not in parameters:
                raise ConfigError(f'unknown key `{where}.{key}` for {reference(target)}{nearest(key, parameters)}')
    try:
        signature.bind(*[None] * len(given), **keys)
    except TypeError as error:
        raise ConfigError(f'`{where}` does not fit {reference(target)}: {error}') from error


def build(section: Mapping[str, Any], where: str, *args: Any) -> Any:
    """Calls a section's `type` with `args` and the section's other keys.

    Raises:
        ConfigError: as `check_arguments`, or the callable refuses a value.
    """
    check_arguments(section, where, given=('',) * len(args))
    target = resolve(section['type'])
    values = {k: v for k, v in section.items() if k != 'type'}
    try:
        return target(*args, **values)
    except (TypeError, ValueError, LookupError) as error:  # `betas=''` is an IndexError
        given = ', '.join(f'{key}={shown(value)}' for key, value in values.items())
        raise ConfigError(f'`{where}`: {reference(target)} refused {given}: {one_line(error)}') from error
