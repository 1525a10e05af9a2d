"""Equations and their solutions."""

from __future__ import annotations

import pytest

from xtuner.chat.plugins import equations
from xtuner.chat.plugins.base import PluginError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(('text', 'solutions'), [
    ('x^2 - 3x + 2 = 0', 'x=1; x=2'), ('x**2-3*x+2', 'x=1; x=2'), ('2x + 1 = 4', 'x=3/2'), ('0.1y = 1', 'y=10'),
    ('x + y = 3, x - y = 1', 'x=2, y=1'), ('a=1; b=2a', 'a=1, b=2'), ('x + y = 3 and x = 1', 'x=1, y=2'),
    ('x^2 = -1', 'x=-I; x=I'), ('2(x+1) = 6', 'x=2'), ('exp(x) = 1', 'x=0'), ('e^x = e', 'x=1'),
    ('3（x＋1）＝9', 'x=2'),
    ('x＋y＝2，x＝1', 'x=1, y=1'),
])  # fmt: skip
def test_solutions(text: str, solutions: str) -> None:
    assert equations.solve(text) == solutions


@pytest.mark.parametrize(('text', 'reason'), [
    ('1 = 1', 'no unknown'), ('x = x', 'every value'), ('1 = 2', 'no unknown'), ('x = x + 1', 'no solution'),
    ('a = b = c', 'one equals sign'), ('', 'one equals sign'),
    ('x^1000 = 1', 'exponent'), ('a+b+c+d+f+g+h = 0', '7 unknowns'), ('x % 2 = 1', 'not supported'),
    ('__import__("os") = 1', 'cannot contain'), ('x.__class__ = 1', 'cannot contain'), ('open(x) = 1', 'unknown'),
    ('solve(x) = 1', 'unknown'), ('sin(x, x) = 1', 'one argument'), ('x =', 'not a formula'),
    ('[x for x in x] = 1', 'cannot contain'), ('x' * 401, 'more than 400'),
])  # fmt: skip
def test_what_cannot_be_solved_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        equations.solve(text)
