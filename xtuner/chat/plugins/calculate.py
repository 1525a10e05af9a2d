"""A calculator: evaluates the syntax tree of a formula, with a limit on the size of every number."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from xtuner.chat.plugins.base import PluginError
from xtuner.chat.plugins.formula import normalise, parse

_MAX_BITS = 4096  # of an integer; larger ones are rejected before they are computed
_MAX_DIGITS = 30  # of a result without exponent

_CONSTANTS = {'pi': math.pi, 'e': math.e, 'tau': math.tau}
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.UAdd: operator.pos, ast.USub: operator.neg,
}  # fmt: skip


class Calculate:
    """`Calculate("2 * (3 + 4)")` is `14`."""

    name, argument = 'Calculate', 'expression'

    def run(self, argument: str) -> str:
        """The value of a formula. Raises PluginError if it has none."""
        try:
            return _format(_value(parse(normalise(argument))))
        except (ArithmeticError, ValueError, TypeError, RecursionError) as error:
            raise PluginError(f'{argument.strip()!r} has no value: {error}') from None


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant):
        return _bounded(node.value)
    if isinstance(node, ast.Name):
        if node.id not in _CONSTANTS:
            raise PluginError(f'{node.id!r} has no value here')
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        return _bounded(_OPERATORS[type(node.op)](left, right))
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if node.func.id not in _FUNCTIONS:
        raise PluginError(f'unknown function {node.func.id!r}; available: {", ".join(sorted(_FUNCTIONS))}')
    return _bounded(_FUNCTIONS[node.func.id](*[_value(argument) for argument in node.args]))


def _power(base: int | float, exponent: int | float) -> int | float:
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        if exponent * base.bit_length() > _MAX_BITS:
            raise PluginError('the number is too large')
        if exponent < 0:
            return float(base) ** exponent
    result = base**exponent
    if isinstance(result, complex):
        raise PluginError('the result is not a real number')
    return _bounded(result)


def _bounded(value: Any) -> int | float:
    if value.bit_length() > _MAX_BITS if isinstance(value, int) else math.isinf(value):
        raise PluginError('the number is too large')
    return value


def _round(value: int | float, digits: int | float = 0) -> int | float:
    return round(value, max(-_MAX_DIGITS, min(int(digits), _MAX_DIGITS)))


def _factorial(value: int | float) -> int:
    if value != int(value) or not 0 <= value <= 500:
        raise PluginError('factorial takes an integer from 0 to 500')
    return math.factorial(int(value))


def _format(value: int | float) -> str:
    """Formats a number without trailing zeros or spurious digits."""
    if isinstance(value, float):
        return f'{value:.12g}'
    digits = str(abs(value))
    if len(digits) <= _MAX_DIGITS:
        return str(value)
    return f'{"-" if value < 0 else ""}{digits[0]}.{digits[1:12]}e+{len(digits) - 1}'


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    'sqrt': math.sqrt, 'cbrt': lambda x: math.copysign(abs(x) ** (1 / 3), x), 'exp': math.exp, 'log': math.log,
    'ln': math.log, 'log10': math.log10, 'log2': math.log2, 'sin': math.sin, 'cos': math.cos, 'tan': math.tan,
    'asin': math.asin, 'acos': math.acos, 'atan': math.atan, 'sinh': math.sinh, 'cosh': math.cosh, 'tanh': math.tanh,
    'degrees': math.degrees, 'radians': math.radians, 'abs': abs, 'round': _round,
    'floor': math.floor, 'ceil': math.ceil, 'factorial': _factorial, 'gcd': math.gcd, 'lcm': math.lcm,
    'min': min, 'max': max, 'pow': _power,
}  # fmt: skip
