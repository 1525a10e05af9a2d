r"""Sanitizes the Markdown of a model's answer for the web page.

A CommonMark parser finds active content: images, which a browser would fetch from any address, raw HTML, links with
other schemes than http, https and mailto, Streamlit's directives (`:red[...]`), code that Streamlit would render as a
diagram, and dollar signs, which it would render as formulas where an answer is about money. Each is escaped by a
backslash, and the text is parsed again until nothing is found, because an escape may expose the content it enclosed.
All other characters stay unchanged. A text that still changes after a few rounds is shown as plain text.

Streamlit's own parser differs in details; the content security policy blocks fetches in any case (`app.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from xtuner.utils.escape import printable

_ROUNDS = 8
_MAX_CHARACTERS = 200_000  # longer answers are shown as plain text
_SCHEME = re.compile(r'\s*(?!https?:|mailto:)[a-z][a-z0-9+.-]*:', re.IGNORECASE)
_DIRECTIVE = re.compile(r':{1,2}(?=[A-Za-z][\w-]*[\[{])|:{3,}')
_DOLLARS = re.compile(r'\$+')
_DEFINITION_END = re.compile(r'(?<!\\)\]:')
_HTML_BEGIN = re.compile(r'<')


class _Unsettled(Exception):
    """The position of a parsed element in the source cannot be determined."""


@dataclass
class _Edits:
    """Edits of a text: offsets at which to insert a backslash, and spans to remove."""

    escapes: set[int] = field(default_factory=set)
    cuts: list[tuple[int, int]] = field(default_factory=list)

    def apply(self, text: str) -> str:
        """Applies the edits."""
        cut = {offset for start, stop in self.cuts for offset in range(start, stop)}
        marked = (('\\' if i in self.escapes else '') + c for i, c in enumerate(text) if i not in cut)
        return ''.join(marked)


def safe_markdown(text: str) -> str:
    r"""Escapes images (which become links), HTML, links with other schemes, and dollar signs outside of formulas.

    Code is unchanged, but never rendered as a diagram. A partial answer may end inside a code block.

    >>> safe_markdown('![x](http://a/b.png) for $5 or $6, `![x]`')
    '\\![x](http://a/b.png) for \\$5 or \\$6, `![x]`'
    """
    text = safe = printable(text.replace('\r\n', '\n').replace('\r', '\n'))
    try:
        for _ in range(_ROUNDS if len(text) <= _MAX_CHARACTERS else 0):
            edits = _find_edits(safe)
            if not (edits.escapes or edits.cuts):
                return safe
            safe = edits.apply(safe)
    except (_Unsettled, RecursionError):  # nested deeper than Python's stack
        pass
    return '  \n'.join(map(plain_markdown, text.split('\n')))


def plain_markdown(text: str) -> str:
    """Escapes a text so that Markdown shows it literally, on one line."""
    line = printable(' '.join(text.split()))
    return ''.join(f'\\{c}' if c in '\\`*_{}[]()<>#+-.!|$:~&@' else c for c in line)


def _find_edits(text: str) -> _Edits:
    parser = _parser()
    env: dict[str, Any] = {}
    lines = text.split('\n')
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    edits, cells = _Edits(), dict[int, int]()
    for token in parser.parse(text, env):
        if token.map is None:
            continue
        first = token.map[0]
        if token.type == 'inline':
            offsets = _offsets(token, lines, starts, cells)
            edits.escapes |= {offsets[i] for i in _inline(parser, token.content, env)}
        elif token.type == 'html_block':
            edits.escapes.add(starts[first] + _position(_HTML_BEGIN, lines[first]))
        elif token.type == 'fence' and 'mermaid' in token.info.lower():
            end = lines[first].rindex(token.markup) + len(token.markup) if token.markup in lines[first] else -1
            edits.cuts.append((starts[first] + end, starts[first] + len(lines[first])))
    defined = [*env.get('references', {}).items(), *((r['label'], r) for r in env.get('duplicate_refs', ()))]
    for label, reference in defined:
        edits.escapes |= set(_definition(label, reference, lines, starts))
    return edits


def _definition(label: str, reference: Any, lines: list[str], starts: list[int]) -> Iterator[int]:
    """The colon of a link definition with another scheme, or of a footnote (`[^1]:`), which contains text."""
    if _SCHEME.match(reference['href']) or label.startswith('^'):
        first, last = reference['map']
        yield starts[first] + _position(_DEFINITION_END, '\n'.join(lines[first:last])) + 1


def _position(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.search(text)
    if match is None:
        raise _Unsettled
    return match.start()


def _offsets(token: Token, lines: list[str], starts: list[int], cells: dict[int, int]) -> list[int]:
    """For each character of the inline content of a block, its offset in the source.

    The lines of the content are those of the source without the block's marker; the cells of a table share a line.
    """
    assert token.map is not None
    offsets: list[int] = []
    for number, content in enumerate(token.content.split('\n'), token.map[0]):
        if number >= len(lines):
            raise _Unsettled
        line, blank = lines[number], len(content) - len(content.lstrip())
        inner = content.strip()
        written = inner.replace('|', r'\|') if number in cells or inner not in line else inner
        at = line.rstrip().rfind(inner) if line.rstrip().endswith(inner) else line.find(written, cells.get(number, 0))
        if at < 0:
            raise _Unsettled
        places, place = [], starts[number] + at
        for char in inner:
            if written is not inner and char == '|':
                place += 1
            places.append(place)
            place += 1
        if token.meta.get('cell'):
            cells[number] = place - starts[number]
        # Leading and trailing blanks are never escaped; they get the offset of the adjacent character.
        end = starts[number] + len(line)
        offsets += [starts[number] + at] * blank + places
        offsets += [place] * (len(content) - blank - len(inner)) + [end]
    return offsets


def _inline(parser: MarkdownIt, content: str, env: dict[str, Any]) -> list[int]:
    """Positions in the inline content of a block that need a backslash."""
    env['escapes'] = []
    parser.inline.parse(content, parser, env, [])
    return env['escapes']


@cache
def _parser() -> MarkdownIt:
    """A CommonMark parser with tables that accepts links of every scheme and any nesting depth."""
    parser = MarkdownIt('commonmark', {'maxNesting': 10**9}).enable('table').disable(['image', 'inline'])
    parser.core.ruler.push('cells', _mark_cells)
    parser.validateLink = lambda url: True  # type: ignore[method-assign]
    parser.normalizeLink = lambda url: url  # type: ignore[method-assign]
    rules = parser.inline.ruler
    for name, report in (('link', _link), ('autolink', _autolink), ('html_inline', _html)):
        original = next(rule.fn for rule in rules.__rules__ if rule.name == name)
        rules.at(name, _reporting(original, report))
    for name, rule in (('dollars', _dollars), ('directive', _directive), ('bang', _bang)):
        rules.before('escape', name, rule)
    return parser


def _mark_cells(state: Any) -> None:
    """Marks the inline content of table cells."""
    for before, token in zip(state.tokens, state.tokens[1:], strict=False):
        if token.type == 'inline':
            token.meta['cell'] = before.type in ('th_open', 'td_open')


def _reporting(rule: Any, report: Any) -> Any:
    """Wraps a rule of the parser so that it also reports the position to escape."""

    def reporting(state: StateInline, silent: bool) -> bool:
        start, num_tokens = state.pos, len(state.tokens)
        matched = rule(state, silent)
        if matched and not silent:
            report(state, start, state.tokens[num_tokens:])
        return matched

    return reporting


def _link(state: StateInline, start: int, tokens: list[Token]) -> None:
    """`[x](javascript:a)`: escapes the parenthesis; link definitions are escaped separately."""
    href = str(next(token for token in tokens if token.type == 'link_open').attrs.get('href', ''))
    label_end = state.md.helpers.parseLinkLabel(state, start, False)
    if _SCHEME.match(href) and state.src[label_end + 1 : label_end + 2] == '(':
        state.env['escapes'].append(label_end + 1)


def _autolink(state: StateInline, start: int, tokens: list[Token]) -> None:
    """`<vscode://a>`."""
    if _SCHEME.match(state.src[start + 1 :]):
        state.env['escapes'].append(start)


def _html(state: StateInline, start: int, tokens: list[Token]) -> None:
    """`<b>`."""
    state.env['escapes'].append(start)


def _bang(state: StateInline, silent: bool) -> bool:
    """`![`: an image, or the start of one whose definition may follow later."""
    if not state.src.startswith('![', state.pos):
        return False
    return _escaped(state, silent, 1)


def _directive(state: StateInline, silent: bool) -> bool:
    """`:red[...]`, `::name{...}`, and `:::` at the start of a line, which opens or closes a container."""
    match = _DIRECTIVE.match(state.src, state.pos, state.posMax)
    if match is None or (len(match.group()) > 2 and state.src[: state.pos].rpartition('\n')[2].strip()):
        return False
    return _escaped(state, silent, len(match.group()))


def _dollars(state: StateInline, silent: bool) -> bool:
    """Skips formulas as a whole and escapes all other dollar signs."""
    match = _DOLLARS.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    end = _formula_end(state.src[: state.posMax], match.start(), match.end())
    if end is None:
        return _escaped(state, silent, len(match.group()))
    if not silent:
        state.pending += state.src[state.pos : end]
    state.pos = end
    return True


def _formula_end(text: str, start: int, inner: int) -> int | None:
    """End of the formula whose dollar signs start at `start` and its content at `inner`; None if it is not one.

    In Streamlit's parser, a formula ends at the next run of equally many signs, and `$$` at the start of a line opens a
    block that ends with a line of `$$`. By Pandoc's rule, the content of a formula in single dollar signs starts and
    ends with a non-space character, and no digit follows it.
    """
    signs = text[start:inner]
    close = next((m for m in _DOLLARS.finditer(text, inner) if m.group() == signs), None)
    if close is None:
        return None
    content = text[inner : close.start()]
    if len(signs) == 1:
        fits = content.strip() == content and '\n' not in content and not text[close.end() : close.end() + 1].isdigit()
        return close.end() if fits else None
    opens_block = not text[:start].rpartition('\n')[2].strip() and '$' not in text[inner:].partition('\n')[0]
    alone = not text[: close.start()].rpartition('\n')[2].strip() and not text[close.end() :].partition('\n')[0].strip()
    return close.end() if content.strip() and (alone or not opens_block) else None


def _escaped(state: StateInline, silent: bool, length: int) -> bool:
    """Consumes characters as text and reports each of them for escaping."""
    if not silent:
        state.env['escapes'] += range(state.pos, state.pos + length)
        state.pending += state.src[state.pos : state.pos + length]
    state.pos += length
    return True
