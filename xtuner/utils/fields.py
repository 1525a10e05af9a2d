"""Validates the types and ranges of fields in files and config sections against a declaration.

A declaration is a type hint (`int`, `str | None`, `list[int]`, `Literal['a', 'b']`, a dataclass's own hints) or a
`Field`, which adds a range.
"""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from xtuner.errors import XTunerError

_WORDS = {
    str: 'text', dict: 'a dict', int: 'a whole number', float: 'a number', bool: 'True or False', type(None): 'None',
    list: 'a list',
}  # fmt: skip
_MAX_SHOWN = 64


@dataclass(frozen=True)
class Field:
    """Type and range of a value.

    Attributes:
        hint: Type hint.
        minimum: Smallest number, in lists for each element; None: no limit.
        maximum: Largest number; None: no limit.
        allowed: The only allowed values; empty: any.
        finite: Whether numbers must be finite; False: floats are unrestricted and the range applies to integers only.
    """

    hint: Any
    minimum: float | None = None
    maximum: float | None = None
    allowed: tuple[Any, ...] = ()
    finite: bool = True

    def fault(self, name: str, value: Any) -> str | None:
        """Returns what is wrong with a value, with its name; None if it is valid."""
        if not fits(value, self.hint):
            return f'`{name}` must be {words(self.hint)}, got {shown(value)}'
        values = value if isinstance(value, list) else [value]
        if self.allowed and value is not None and any(v not in self.allowed for v in values):
            return f'`{name}` must be one of {", ".join(map(repr, self.allowed))}, got {shown(value)}'
        for number in values:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if not self.finite and isinstance(number, float):
                continue
            if self.minimum is not None and number < self.minimum:
                return f'`{name}` must be at least {self.minimum}, got {shown(number)}'
            if self.maximum is not None and number > self.maximum:
                return f'`{name}` must be at most {self.maximum}, got {shown(number)}'
            if isinstance(number, float) and not math.isfinite(number):
                return f'`{name}` must be a finite number, got {shown(number)}'
        return None


def check_fields(
    content: Mapping[str, Any], declared: Mapping[str, Field], where: object, error: type[XTunerError]
) -> None:
    """Checks the declared fields of a mapping; ignores all others.

    Args:
        content: Fields by name.
        declared: Declarations by name.
        where: The file, for the error message.
        error: The error class to raise.

    Raises:
        XTunerError: Of the given class; names the file, the first wrong field and its value.
    """
    for name, field in declared.items():
        if name in content and (fault := field.fault(name, content[name])):
            raise error(f'{where}: {fault}')


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON matches a type hint; an integer is a valid float, a bool is not a number."""
    base, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if base is Any:
        return True
    if base in (typing.Union, types.UnionType):
        return any(fits(value, kind) for kind in inner)
    if base is typing.Literal:
        return value in inner
    if base is list:
        return isinstance(value, list) and (not inner or all(fits(v, inner[0]) for v in value))
    if base in (tuple, set):  # JSON has lists for them
        return isinstance(value, (list, tuple, set))
    if base is dict:
        return isinstance(value, dict) and (not inner or all(fits(v, inner[1]) for v in value.values()))
    if base is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(base, type):
        return True
    if issubclass(base, enum.Enum):
        return isinstance(value, base) or any(value == member.value for member in base)
    return isinstance(value, dict) if is_dataclass(base) and not isinstance(value, base) else isinstance(value, base)


def words(hint: Any) -> str:
    """Describes a type in words, such as 'a whole number or None'."""
    base, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if base in (typing.Union, types.UnionType):
        # typing keeps the order in which a union was first created; sorting makes the message deterministic.
        return ' or '.join(sorted({words(kind) for kind in inner}, key=lambda word: (word == 'None', word)))
    if base is typing.Literal:
        return ('one of ' if len(inner) > 1 else '') + ', '.join(map(repr, inner))
    if base is list and inner and inner[0] is not Any:
        return f'a list of {words(inner[0]).removeprefix("a ")}'
    if isinstance(base, type) and issubclass(base, enum.Enum):
        return f'one of {", ".join(repr(member.value) for member in base)}'
    if isinstance(base, type) and is_dataclass(base):
        return 'a dict'
    return _WORDS.get(base, getattr(base, '__name__', str(base)))


def shown(value: Any) -> str:
    """`repr` of a value for a message, on one line and truncated."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return f'a number of {value.bit_length():,} bits'
    return text if len(text) <= _MAX_SHOWN else f'{text[: _MAX_SHOWN - 3]}...'
