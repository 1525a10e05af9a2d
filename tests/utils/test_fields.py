"""The checker of declared fields."""

from __future__ import annotations

import enum
from typing import Any, Literal, Optional, Union

import pytest

from xtuner.errors import ModelError
from xtuner.utils.fields import Field, check_fields, fits, words

pytestmark = pytest.mark.unit


class Kind(str, enum.Enum):
    LORA = 'LORA'


@pytest.mark.parametrize(
    ('hint', 'good', 'bad'),
    [
        (int, [0, -3, 10**30], [True, 1.0, '1', None, []]),
        (float, [0, 1.5], [True, '1', None]),
        (str, ['', 'x'], [1, None, [], {}]),
        (bool, [True], [1, 'true', None]),
        (int | None, [None, 1], [1.5, 'x']),
        (Optional[Union[list[str], str]], [None, 'x', ['x'], []], [1, [1], {}]),  # noqa: UP007, UP045
        (list[int | None], [[1, None], []], [[1.5], 'x']),
        (dict[str, int], [{'a': 1}, {}], [{'a': 'x'}, []]),
        (Literal['a', True], ['a', True], ['b', [], {}]),
        (Kind, ['LORA', Kind.LORA], ['lora', 1, [], {}]),
        (Any, [None, object()], []),
    ],
)
def test_values_and_hints(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(fits(value, hint) for value in good)
    assert not any(fits(value, hint) for value in bad)
    assert words(hint)


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        (Field(int, minimum=1), 0, '`x` must be at least 1, got 0'),
        pytest.param(Field(int, maximum=9), 10**5000, '`x` must be at most 9, got a number of 16,610 bits', id='long'),
        (Field(list[int], maximum=9), [1, 10], '`x` must be at most 9, got 10'),
        (Field(float), float('nan'), '`x` must be a finite number, got nan'),
        (Field(str), ['y' * 10**6], "`x` must be text, got ['y"),
        (Field(str, allowed=('a', 'b')), 'c', "`x` must be one of 'a', 'b', got 'c'"),
        (Field(int | None), 'x', "`x` must be a whole number or None, got 'x'"),
    ],
)
def test_a_fault_names_file_field_and_value(field: Field, value: Any, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_fields({'x': value}, {'x': field, 'y': field}, 'config.json', ModelError)
    assert str(caught.value).startswith(f'config.json: {message}')
    assert len(str(caught.value)) < 200


def test_a_sound_field_is_taken() -> None:
    check_fields({'x': 3, 'other': object()}, {'x': Field(int, minimum=1, maximum=3)}, 'f', ModelError)
