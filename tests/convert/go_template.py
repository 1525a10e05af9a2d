"""As much of Go's text/template as our Modelfiles use, to compare them with the templates they come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\$?\.?\w+|\.\w+|:?=')


def render(template: str, messages: list[dict[str, str]]) -> str:
    """The text that Go gives for `.Messages`."""
    parts = iter(re.split(r'\{\{ ((?:"(?:[^"\\]|\\.)*"|[^"])*?) \}\}', template))
    return ''.join(_run(_parse(parts)[0], {'.': {'.Messages': messages}}))


def _parse(parts: Iterator[str]) -> tuple[list[Any], str]:
    """Nested lists of texts, actions and blocks, up to the `end` or `else` that closes them."""
    nodes: list[Any] = [next(parts)]
    for action in parts:
        words = _WORD.findall(action)
        if words[0] in ('end', 'else'):
            return nodes, action
        if words[0] in ('range', 'if'):
            branches, closing = [], action
            while closing != 'end':
                body, following = _parse(parts)
                branches.append((_WORD.findall(closing.removeprefix('else ')), body))
                closing = following
            nodes.append(branches)
        else:
            nodes.append(words)
        nodes.append(next(parts))
    return nodes, ''


def _run(nodes: list[Any], scope: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif node and isinstance(node[0], tuple):
            yield from _block(node, scope)
        elif len(node) > 1 and node[1] in (':=', '='):
            scope[node[0]] = _value(node[2:], scope)
        else:
            yield _value(node, scope)


def _block(branches: list[tuple[list[str], list[Any]]], scope: dict[str, Any]) -> Iterator[str]:
    words, body = branches[0]
    if words[0] == 'range':
        outer = scope['.']
        for item in _value(words[1:], scope):
            scope['.'] = {f'.{key}': value for key, value in item.items()}
            yield from _run(body, scope)
        scope['.'] = outer
        return
    for words, body in branches:
        holds = _value([words[2]], scope) == _value([words[3]], scope) if words[1] == 'eq' else _value(words[1:], scope)
        if holds:
            yield from _run(body, scope)
            return


def _value(words: list[str], scope: dict[str, Any]) -> Any:
    if words[0] == 'printf':
        return ''.join(_value([word], scope) for word in words[2:])
    word = words[0]
    return json.loads(word) if word.startswith('"') else scope['.'][word] if word.startswith('.') else scope[word]
