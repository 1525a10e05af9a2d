"""Writes a checked config as the source of one flat file with a comment for every key (`xtuner copy-cfg`)."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from xtuner.config.schema import ARGUMENT_TEXTS, TrainConfig
from xtuner.registry import reference

_COMMENT_COLUMN = 44
_WIDTH = 120


def flatten(config: TrainConfig, *, title: str) -> str:
    """Returns Python source that loads to an equal `TrainConfig`, with imports, sections and comments.

    Example of a line: `    max_length=2048,                      # tokens per pack`
    """
    imports: set[tuple[str, str]] = set()
    sections = [_section(field, getattr(config, field.name), imports) for field in dataclasses.fields(config)]
    lines = [f'# {title}', '# Edit it and train with `xtuner train THIS_FILE`.', '']
    lines += [f'from {module} import {name}' for module, name in sorted(imports)]
    return '\n'.join([*lines, *sections]).rstrip() + '\n'


def _section(field: dataclasses.Field[Any], value: Any, imports: set[tuple[str, str]]) -> str:
    title = field.metadata['text']
    if dataclasses.is_dataclass(value):
        rows = [(f.name, getattr(value, f.name), _comment(f)) for f in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        rows = [
            (key, item, ARGUMENT_TEXTS.get(f'{field.name}.{key}', ARGUMENT_TEXTS.get(key, '')))
            for key, item in value.items()
        ]
    else:
        return f'\n# {title}\n{field.name} = {_source(value, imports)}'
    body = '\n'.join(_row(f'    {k}={_source(v, imports, is_type=_is_import(k, v))},', text) for k, v, text in rows)
    return f'\n# {title}\n{field.name} = dict(\n{body}\n)'


def _comment(field: dataclasses.Field[Any]) -> str:
    text, allowed = field.metadata['text'], field.metadata['allowed']
    others = [str(value) for value in allowed if str(value) not in text]  # not explained by the text
    also = 'also ' if len(others) < len(allowed) else ''
    return f'{text} ({also}{", ".join(others)})' if others else text


def _row(code: str, comment: str) -> str:
    if not comment:
        return code
    if len(code) > _COMMENT_COLUMN - 2 or _COMMENT_COLUMN + len(comment) + 2 > _WIDTH:
        lines = textwrap.wrap(comment, _WIDTH - len('    # '))
        return '\n'.join([*(f'    # {line}' for line in lines), code])
    return f'{code:{_COMMENT_COLUMN}}# {comment}'


def _is_import(key: str, value: Any) -> bool:
    named = key == 'type' and isinstance(value, str) and ':' in value
    return (callable(value) or named) and '.py:' not in reference(value)  # a file name stays text


def _source(value: Any, imports: set[tuple[str, str]], *, is_type: bool = False) -> str:
    """The expression of a value; a `type` such as 'peft:LoraConfig' becomes a name, which is added to `imports`."""
    if isinstance(value, Mapping):
        inner = (f'{k}={_source(v, imports, is_type=_is_import(k, v))}' for k, v in value.items())
        return 'dict(' + ', '.join(inner) + ')'
    if isinstance(value, (list, tuple)):
        items = ', '.join(_source(v, imports) for v in value)
        if isinstance(value, list):
            return f'[{items}]'
        return f'({items},)' if len(value) == 1 else f'({items})'
    if value is None or isinstance(value, (bool, int, float)) or (isinstance(value, str) and not is_type):
        return repr(value)
    module, _, name = reference(value).rpartition(':')
    if module.endswith('.py'):
        return repr(reference(value))
    imports.add((module, name))
    return name
