"""Solves equations with sympy, as a separate program: `python -m xtuner.chat.plugins.equations < TEXT`.

Sympy's own parser evaluates text as Python. This one builds sympy's expressions from the syntax tree, node by node. The
program limits its own CPU time and memory; the caller limits the elapsed time.
"""

from __future__ import annotations

import ast
import re
import sys
from typing import Any

from xtuner.chat.plugins.base import PluginError
from xtuner.chat.plugins.formula import MAX_CHARACTERS, normalise, parse

SECONDS = 10
_MEMORY = 2 * 2**30
_MAX_EXPONENT = 100
_MAX_UNKNOWNS = 6
_FUNCTIONS = {'sqrt': 'sqrt', 'exp': 'exp', 'log': 'log', 'ln': 'log', 'sin': 'sin', 'cos': 'cos', 'tan': 'tan',
              'asin': 'asin', 'acos': 'acos', 'atan': 'atan', 'abs': 'Abs'}  # fmt: skip
_CONSTANTS = {'pi': 'pi', 'e': 'E', 'E': 'E'}


def solve(text: str) -> str:
    """Solves one or more equations, separated by commas, semicolons or newlines.

    An expression without an equals sign is set to zero.

    Raises:
        PluginError: the text is not an equation, or sympy finds no solution.
    """
    import sympy

    sides = [normalise(part).split('=') for part in _separate(text)]
    if not sides or any(len(pair) > 2 for pair in sides):
        raise PluginError('an equation has one equals sign; separate equations by commas')
    pairs = [[_expression(parse(side)) for side in (*pair, '0')[:2]] for pair in sides]
    unknowns = sorted({name for pair in pairs for side in pair for name in side.free_symbols}, key=str)
    system = [left - right for left, right in pairs]
    if not unknowns:
        raise PluginError('the equation has no unknown')
    if len(unknowns) > _MAX_UNKNOWNS:
        raise PluginError(f'there are {len(unknowns)} unknowns, more than {_MAX_UNKNOWNS}')
    if all(equation == 0 for equation in system):
        raise PluginError('the equation holds for every value')
    try:
        solutions = sympy.solve(system, unknowns, dict=True)
    except NotImplementedError:
        raise PluginError('no method is known for this equation') from None
    if not solutions:
        raise PluginError('there is no solution')
    return '; '.join(', '.join(f'{n}={value}' for n, value in sorted(one.items(), key=str)) for one in solutions)


def _separate(text: str) -> list[str]:
    """Splits at commas, semicolons, newlines and the word `and`, except within brackets."""
    if len(text) > MAX_CHARACTERS:
        raise PluginError(f'the equations have {len(text)} characters, more than {MAX_CHARACTERS}')
    parts, depth = [''], 0
    for token in re.split(r'([()（）,;，；\n]|\band\b)', text):
        depth += (token in ('(', '（')) - (token in (')', '）'))
        if depth == 0 and token in (',', ';', '，', '；', '\n', 'and'):
            parts.append('')
        else:
            parts[-1] += token
    return [part for part in parts if part.strip()]


def _expression(node: ast.expr) -> Any:
    import sympy

    if isinstance(node, ast.Constant):
        # A float stands for its decimal text: 0.1 is one tenth.
        return sympy.Integer(node.value) if isinstance(node.value, int) else sympy.Rational(repr(node.value))
    if isinstance(node, ast.Name):
        return getattr(sympy, _CONSTANTS[node.id]) if node.id in _CONSTANTS else sympy.Symbol(node.id)
    if isinstance(node, ast.UnaryOp):
        value = _expression(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return _operation(node.op, _expression(node.left), _expression(node.right))
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    if node.func.id not in _FUNCTIONS:
        raise PluginError(f'unknown function {node.func.id!r}; available: {", ".join(sorted(_FUNCTIONS))}')
    if len(node.args) != 1:
        raise PluginError(f'{node.func.id} takes one argument')
    return getattr(sympy, _FUNCTIONS[node.func.id])(_expression(node.args[0]))


def _operation(op: ast.operator, left: Any, right: Any) -> Any:
    if isinstance(op, ast.Add):
        return left + right
    if isinstance(op, ast.Sub):
        return left - right
    if isinstance(op, ast.Mult):
        return left * right
    if isinstance(op, ast.Div):
        return left / right
    if isinstance(op, ast.Pow):
        if right.is_number and abs(right) > _MAX_EXPONENT:
            raise PluginError(f'an exponent is larger than {_MAX_EXPONENT}')
        return left**right
    raise PluginError('// and % are not supported in equations')


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows: only the caller's timeout applies
        return
    for kind, limit in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, _MEMORY)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> int:
    """Reads equations from stdin and prints solutions; exits with status 3 and the reason if there are none."""
    _limit_resources()
    try:
        print(solve(sys.stdin.read()))
    except PluginError as error:
        print(error)
        return 3
    return 0


if __name__ == '__main__':
    sys.exit(main())
