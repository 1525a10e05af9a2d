"""A model's answer as Markdown that a page may show.

Streamlit itself shows HTML as text. Left to us are images, which a browser would fetch from wherever the answer says,
links to elsewhere than the web, code that Streamlit would draw as a diagram, and dollar signs, of which it makes
formulas where an answer speaks of money.
What slips through here, being odd Markdown, is still not fetched: the page's security policy forbids it (`app.py`).
"""

from __future__ import annotations

import re

from xtuner.utils.escape import printable

_FENCE = re.compile(r'(?P<before>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)*)(?P<mark>`{3,}|~{3,})(?P<info>.*)')
_BLANK = re.compile(r'(\n[ \t]*\n)')  # what ends a paragraph, and a piece of code in it
_CODE = re.compile(r'(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)', re.DOTALL)
_IMAGE = re.compile(r'(\\*)!(?=\[)')
_SCHEME = r'(?!https?:|mailto:)[a-z][a-z0-9+.-]*:'  # in a link, a reference to one, or a bare one in <>
_LINK = re.compile(rf'(?<=\])(?=\(\s*<?{_SCHEME})|(?<=\])(?=:\s*<?{_SCHEME})|(?=<{_SCHEME})', re.IGNORECASE)
# Pandoc's rule: a formula begins before and ends after a character that is no space, and no digit follows.
_DOLLAR = re.compile(
    r'(?P<escaped>\\.) | (?P<formula>\$\$.+?\$\$ | \$(?![\s$])(?:\\.|[^$\\\n])*?(?<!\s)\$(?!\d)) | \$',
    re.DOTALL | re.VERBOSE,
)


def safe_markdown(text: str) -> str:
    r"""Escapes images, which become links to click on, links of odd schemes, and dollar signs that open no formula.

    Code is left as it is, but is never drawn as a diagram. An answer still under way may end inside a block of code.

    >>> safe_markdown('![x](http://a/b.png) for $5 or $6, `![x]`')
    '\\![x](http://a/b.png) for \\$5 or \\$6, `![x]`'
    """
    text = printable(text.replace('\r\n', '\n'))
    parts = (part if is_code else ''.join(map(_paragraph, _BLANK.split(part))) for is_code, part in _blocks(text))
    return ''.join(parts)


def plain_markdown(text: str) -> str:
    """Text as Markdown that shows just that, on one line."""
    line = printable(' '.join(text.split()))
    return ''.join(f'\\{c}' if c in '\\`*_{}[]()<>#+-.!|$:~&@' else c for c in line)


def _blocks(text: str) -> list[tuple[bool, str]]:
    """Cuts a text at its fences: (whether it is code, whole lines)."""
    blocks: list[tuple[bool, str]] = []
    fence, quoted = '', False  # the one that opened the block we are in, and whether it stands in a quotation
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        if found and found['mark'].startswith('`') and '`' in found['info']:
            found = None  # code within a line
        if fence and quoted and not line.lstrip().startswith('>'):
            fence = ''
        is_code = bool(fence or found)
        if found and not fence:
            fence, quoted = found['mark'], '>' in found['before']
            if 'mermaid' in found['info'].lower():
                line = found['before'] + fence + '\n'
        elif found and found['mark'].startswith(fence) and not found['info'].strip():
            fence = ''
        if blocks and blocks[-1][0] == is_code:
            line = blocks.pop()[1] + line
        blocks.append((is_code, line))
    return blocks


def _paragraph(text: str) -> str:
    pieces, end = [], 0
    for code in _CODE.finditer(text):
        pieces += [_escape(text[end : code.start()]), code.group()]
        end = code.end()
    return ''.join([*pieces, _escape(text[end:])])


def _escape(text: str) -> str:
    text = _IMAGE.sub(lambda m: m.group() if len(m.group(1)) % 2 else m.group(1) + '\\!', text)
    text = _LINK.sub(r'\\', text)
    return _DOLLAR.sub(lambda m: m.group() if m.lastgroup else '\\$', text)
