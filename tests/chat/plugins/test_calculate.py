"""The calculator: right values, bounded work, nothing executed."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.chat.plugins.base import PluginError
from xtuner.chat.plugins.calculate import Calculate

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(('formula', 'value'), [
    ('2 * (3 + 4)', '14'), ('2^10', '1024'), ('1/3', '0.333333333333'), ('0.1+0.2', '0.3'), ('2(3)', '6'),
    ('(1+2)(3)', '9'), ('-2**2', '-4'), ('2**-1', '0.5'), ('7 // 2 + 7 % 4', '6'), ('1.5e-3+1', '1.0015'),
    ('12÷4×2', '6'), ('（1＋2）＊3', '9'), ('sqrt(2)', '1.41421356237'), ('2pi', '6.28318530718'), ('log10(1000)', '3'),
    ('2**200', '1.60693804425e+60'), ('-(10**40)', '-1.00000000000e+40'), ('factorial(20)', '2432902008176640000'),
    ('round(2.567, 2)', '2.57'), ('max(1, 2, 3)', '3'), ('1_000 + 1', '1001'),
])  # fmt: skip
def test_values(formula: str, value: str) -> None:
    assert Calculate().run(formula) == value


@pytest.mark.parametrize('formula', [
    '__import__("os").system("true")', 'os', '().__class__', 'open("x")', '[1] * 10**9', '"a" * 10**9', 'lambda: 1',
    '(x := 1)', 'f"{1}"', 'sqrt.__class__', '{1: 2}', '1 if 1 else 2', '1 < 2', 'True', 'exec(1)', 'sqrt(x=2)', '1;2',
    'print(1)', 'abs(*[1])', '1j', '...', 'None', 'await x', '', '1,2',
])  # fmt: skip
def test_only_arithmetic(formula: str) -> None:
    with pytest.raises(PluginError):
        Calculate().run(formula)


@pytest.mark.parametrize('formula', [
    '9**9**9', '10**100000', '2**4096 * 2**4096', '-'.join(['9'] * 10) + '**9999', 'factorial(10**6)', '1e400',
    '1e308*10', 'pow(10, 10**10)', '(' * 390,
    '-' * 390 + '1', '1' * 401, '2.0**99999', 'sqrt(-1)', '1/0', 'log(0)', '(-8)**(1/3)', 'factorial(0.5)', 'max()',
])  # fmt: skip
def test_what_has_no_value_is_said_at_once(formula: str) -> None:
    started = time.perf_counter()
    try:
        Calculate().run(formula)
    except PluginError as error:
        assert '\n' not in str(error)
    assert time.perf_counter() - started < 1


def test_rounding_to_many_digits_is_bounded() -> None:
    started = time.perf_counter()
    assert Calculate().run('round(5, -10**9)') == '0'
    assert time.perf_counter() - started < 1


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.integers(0, 99).map(str), lambda inner: st.tuples(inner, st.sampled_from('+-*'), inner).map(
    lambda t: f'({t[0]} {t[1]} {t[2]})'), max_leaves=12))  # fmt: skip
def test_whole_numbers_are_exact(formula: str) -> None:
    """Python itself is the judge: the formula is made here, of digits and three operators."""
    expected = eval(formula, {'__builtins__': {}})  # noqa: S307
    if abs(expected) < 10**30 and len(formula) < 400:
        assert Calculate().run(formula) == str(expected)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_value_or_a_reason(text: str) -> None:
    try:
        value = Calculate().run(text)
    except PluginError:
        return
    assert math.isfinite(float(value)) or value == 'nan'
