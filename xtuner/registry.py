"""The registries, and the one way from a `type` in a config to the object it names.

- `BUILDER` holds short names for anything that a `dict(type=...)` may build.
- `MAP_FUNC` holds the functions that turn a raw record into a conversation (`xtuner.dataset.map_fns`).
- `TEMPLATES` holds the prompt formats (`xtuner.dataset.template`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mmengine.registry import Registry

from xtuner.errors import ConfigError, nearest

BUILDER = Registry('builder')
MAP_FUNC = Registry('map function', locations=['xtuner.dataset.map_fns'])
TEMPLATES = Registry('template', locations=['xtuner.dataset.template'])


def resolve(target: Any) -> Callable[..., Any]:
    """The callable behind a `type`: itself, a registered name, or 'module:name', which is imported.

    Raises:
        ConfigError: the module or the name does not exist, or is not callable.
    """
    if callable(target):
        return target
    if not isinstance(target, str):
        raise ConfigError(f'`type` must be a class, a function or text such as "peft:LoraConfig", got {target!r}')
    module_name, colon, name = target.partition(':')
    if not colon:
        found = BUILDER.get(target)
        if found is None:
            raise ConfigError(
                f'no registered type {target!r}{nearest(target, BUILDER.module_dict)}; '
                'a type that is not registered is written "module:name"'
            )
        return found
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f'type {target!r} cannot be imported: {error}') from error
    except AttributeError as error:
        raise ConfigError(f'module {module_name!r} has no {name!r}') from error
    if not callable(found):
        raise ConfigError(f'type {target!r} is a {type(found).__name__}, which cannot be called')
    return found


def reference(target: Any) -> str:
    """The text 'module:name' that `resolve` turns into `target` again."""
    return target if isinstance(target, str) else f'{target.__module__}:{target.__qualname__}'


def check_arguments(section: Mapping[str, Any], where: str, *, given: tuple[str, ...] = ()) -> None:
    """Checks that the keys of a `dict(type=..., ...)` are arguments of its type, without calling it.

    Args:
        section: The mapping from a config.
        where: The section's name, for the message.
        given: Names of leading arguments that the caller will add itself.

    Raises:
        ConfigError: an unknown or a missing argument, with the nearest known name.
    """
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
    try:
        return target(*args, **{k: v for k, v in section.items() if k != 'type'})
    except (TypeError, ValueError) as error:
        raise ConfigError(f'`{where}`: {reference(target)} refused its arguments: {error}') from error
