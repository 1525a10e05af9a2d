"""A model's answer as Markdown that a page may show.

Streamlit itself shows HTML as text. Left to us are images, which a browser would fetch from wherever the answer says,
and dollar signs, of which Streamlit makes formulas where an answer speaks of money. What slips through here, being odd
Markdown, is still not fetched: the page's security policy forbids it (`app.py`).
"""

from __future__ import annotations

import re

_FENCE = re.compile(r'(?P<before>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)*)(?P<mark>`{3,}|~{3,})(?P<info>.*)')
_CODE = re.compile(r'(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)', re.DOTALL)  # within a paragraph
_IMAGE = re.compile(r'(\\*)!(?=\[)')
# Pandoc's rule: a formula begins before and ends after a character that is no space, and no digit follows.
_DOLLAR = re.compile(
    r'(?P<escaped>\\.) | (?P<formula>\$\$.+?\$\$ | \$(?![\s$])(?:\\.|[^$\\\n])*?(?<!\s)\$(?!\d)) | \$',
    re.DOTALL | re.VERBOSE,
)


def safe_markdown(text: str) -> str:
    r"""Escapes what begins an image, so that a link is left of it, and dollar signs that belong to no formula.

    Code is left as it is. An answer still under way may end inside a block of code.

    >>> safe_markdown('![x](http://a/b.png) for $5 or $6, `![x]`')
    '\\![x](http://a/b.png) for \\$5 or \\$6, `![x]`'
    """
    return ''.join(part if is_code else _prose(part) for is_code, part in _blocks(text))


def _blocks(text: str) -> list[tuple[bool, str]]:
    """Cuts a text at its fences: (whether it is code, whole lines)."""
    blocks: list[tuple[bool, str]] = []
    fence = ''  # the one that opened the block we are in
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        mark, info = (found['mark'], found['info'].strip()) if found else ('', '')
        if mark.startswith('`') and '`' in info:
            mark = ''  # code within a line
        is_code = bool(fence or mark)
        if not fence:
            fence = mark
        elif mark.startswith(fence) and not info:
            fence = ''
        if blocks and blocks[-1][0] == is_code:
            line = blocks.pop()[1] + line
        blocks.append((is_code, line))
    return blocks


def _prose(text: str) -> str:
    pieces, end = [], 0
    for code in _CODE.finditer(text):
        pieces += [_escape(text[end : code.start()]), code.group()]
        end = code.end()
    return ''.join([*pieces, _escape(text[end:])])


def _escape(text: str) -> str:
    text = _IMAGE.sub(lambda m: m.group() if len(m.group(1)) % 2 else m.group(1) + '\\!', text)
    return _DOLLAR.sub(lambda m: m.group() if m.lastgroup else '\\$', text)
