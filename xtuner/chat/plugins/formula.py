"""Parses formulas into syntax trees that contain only arithmetic, for the calculator and the solver."""

from __future__ import annotations

import ast
import re

from xtuner.chat.plugins.base import PluginError

MAX_CHARACTERS = 400
_SIGNS = str.maketrans({'×': '*', '·': '*', '÷': '/', '−': '-', '–': '-', '（': '(', '）': ')', '，': ',',
                              '＝': '=', '＋': '+', '＊': '*', '／': '/', 'π': 'pi'})  # fmt: skip
_ALLOWED = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Call, ast.Load,
    ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.UAdd, ast.USub,
)  # fmt: skip


def normalise(text: str) -> str:
    """Converts mathematical notation to Python's: `×`, `÷`, `^`, `2x`, `(a)(b)`."""
    if len(text) > MAX_CHARACTERS:
        raise PluginError(f'the formula has {len(text)} characters, more than {MAX_CHARACTERS}')
    text = text.translate(_SIGNS).replace('^', '**')
    text = re.sub(r'(?<![A-Za-z_0-9.])(\d+\.?\d*|\.\d+)\s*(?=(?![eE][+-]?\d)[A-Za-z(])', r'\1*', text)
    return re.sub(r'\)\s*(?=[A-Za-z0-9(])', ')*', text)


def parse(text: str) -> ast.expr:
    """Parses one formula into a syntax tree.

    The tree contains only numbers, names, arithmetic operators and calls of plain names with positional arguments.

    Raises:
        PluginError: the text is not a formula, or contains anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode='eval')
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise PluginError(f'{text.strip()!r} is not a formula') from None
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise PluginError(f'a formula cannot contain {type(node).__name__}')
        if isinstance(node, ast.Constant) and type(node.value) not in (int, float):
            raise PluginError(f'a formula cannot contain {node.value!r}')
        if isinstance(node, ast.Call) and (node.keywords or not isinstance(node.func, ast.Name)):
            raise PluginError('functions are called as in sqrt(2)')
    return tree.body
