"""Errors: their families, exit statuses, and the parts of their one line."""

from __future__ import annotations

import pytest

from xtuner.errors import ConfigError, Interrupted, TrainingError, UsageError, first_few, first_of, nearest, one_line

pytestmark = pytest.mark.unit


def test_handlers_of_pythons_own_errors_still_catch_them() -> None:
    assert isinstance(ConfigError(''), ValueError) and isinstance(TrainingError(''), RuntimeError)


def test_exit_statuses() -> None:
    assert (UsageError('').exit_status, ConfigError('').exit_status, Interrupted(15, '').exit_status) == (2, 1, 143)


def test_the_nearest_names_come_first() -> None:
    assert nearest('lora', ['qlora', 'full', 'lora_r']) == "; did you mean 'qlora' or 'lora_r'?"
    assert nearest('lora', ['qlora', 'lora_r'], most=1) == "; did you mean 'qlora'?"
    assert nearest('x', ['abc']) == ''


def test_lists_of_names() -> None:
    assert (first_of(['a']), first_of(['a', 'b', 'c'])) == ("'a'", "'a' (and 2 more)")
    assert (first_few(['a', 'b'], 2), first_few(range(1003), 2)) == ('a, b', '0, 1 and 1,001 more')


@pytest.mark.parametrize(
    ('error', 'line'),
    [
        (ValueError('two\n  lines'), 'two lines'),
        (KeyError('a'), "KeyError: 'a'"),
        (AssertionError(), 'AssertionError'),
        (RuntimeError(), 'RuntimeError'),
        ('a text', 'a text'),
        (ValueError('x' * 600), 'x' * 500),
    ],
)
def test_any_error_is_one_line_that_says_something(error: object, line: str) -> None:
    assert one_line(error) == line
