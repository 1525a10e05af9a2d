"""Checks the arguments of `optimizer` and `adapter` without importing the classes that take them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.utils.fields import Field, shown, words

_LARGEST = 1e30  # torch stores optimizer settings in float32, whose maximum is 3.4e38
PATTERNS = ('target_modules', 'exclude_modules', 'layers_pattern', 'modules_to_save', 'feedforward_modules',
            'rank_pattern', 'alpha_pattern', 'target_parameters')  # fmt: skip
"""The fields of peft's configs that contain module names, or regular expressions that match them."""
_TEXTS = (*PATTERNS, 'prompt_tuning_init_text', 'tokenizer_name_or_path')  # may look like numbers: module '0'
_FIELDS = {
    'optimizer.lr': Field(float, minimum=0, maximum=10**9),
    'adapter.r': Field(int, minimum=1, maximum=2**16),
    'adapter.lora_alpha': Field(float, minimum=-_LARGEST, maximum=_LARGEST),
    'adapter.lora_dropout': Field(float, minimum=0, maximum=1),
}


def argument_faults(section: Mapping[str, Any] | None, where: str) -> Iterator[str]:
    """Yields the errors in the arguments of a section.

    Args:
        section: A mapping with a `type` and its arguments, or None.
        where: 'optimizer' or 'adapter'.
    """
    for name, value in (section or {}).items():
        path = f'{where}.{name}'
        if path in _FIELDS:
            field = _FIELDS[path]
            fault = field.fault(path, value) if value is not None else f'`{path}` needs {words(field.hint)}, got None'
        elif name == 'type' or not isinstance(name, str):
            continue
        elif name in _TEXTS:
            fault = _pattern_fault(path, value) if name in PATTERNS else None
        else:
            fault = _number_fault(path, value)
        if fault:
            yield fault


def _number_fault(path: str, value: Any) -> str | None:
    """Rejects numbers given as text, such as `nan` on a command line, and numbers out of range."""
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(item, str) and _is_number(item):
            return f'`{path}` must be a number, got {shown(item)}'
        if isinstance(item, (int, float)) and not abs(item) <= _LARGEST:
            return f'`{path}` must be a finite number of at most {_LARGEST:g}, got {shown(item)}'
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _pattern_fault(path: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        return f'`{path}` is not a regular expression ({error}), got {shown(value)}'
    return None
