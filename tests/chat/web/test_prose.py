"""What an answer may make the page draw."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from xtuner.chat.web import prose
from xtuner.chat.web.prose import plain_markdown, safe_markdown

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('![x](http://a/b.png)', '\\![x](http://a/b.png)'),
        ('![x][ref] and ![y]', '\\![x][ref] and \\![y]'),
        ('\\![a link](u)', '\\![a link](u)'),  # escaped already
        ('\\\\![x](u)', '\\\\\\![x](u)'),  # what is escaped there is the backslash
        ('Wow! [a link](u)', 'Wow! [a link](u)'),
        ('`![x](u) $5`, ![x](u)', '`![x](u) $5`, \\![x](u)'),
        ('``a ` ![x](u)``', '``a ` ![x](u)``'),
        ('one ` alone ![x](u)', 'one ` alone \\![x](u)'),
        ('a ` here\n\n![x](u)\n\nand ` there', 'a ` here\n\n\\![x](u)\n\nand ` there'),  # not one piece of code
        ('```\n![x](u)\n```\n![y](u)', '```\n![x](u)\n```\n\\![y](u)'),
        ('````\n```\n![x](u)\n````\n![y](u)', '````\n```\n![x](u)\n````\n\\![y](u)'),
        ('~~~\n```\n![x](u)\n~~~~\n![y](u)', '~~~\n```\n![x](u)\n~~~~\n\\![y](u)'),
        ('```\n``` no end\n![x](u)', '```\n``` no end\n![x](u)'),
        ('``` in a line ``` ![x](u)', '``` in a line ``` \\![x](u)'),
        ('1. ```py\n   ![x](u)\n   ```\n![y](u)', '1. ```py\n   ![x](u)\n   ```\n\\![y](u)'),
        ('> ```\n> ![x](u)\n![y](u)', '> ```\n> ![x](u)\n\\![y](u)'),
        ('```mermaid\ngraph LR\n```', '```\ngraph LR\n```'),
        ('```\n```mermaid\n', '```\n```mermaid\n'),
        ('still under way:\n```\n![x](u', 'still under way:\n```\n![x](u'),
        ('[x](javascript:a) [y](DATA:a)', '[x]\\(javascript:a) [y]\\(DATA:a)'),
        ('[x]( <file:///a>) <vscode://a>', '[x]\\( \\<file:///a>) \\<vscode://a>'),
        ('[x]: javascript:a', '[x]\\: javascript:a'),
        ('[x](https://a) <mailto:a@b> [y](#z) [z](/q)', '[x](https://a) <mailto:a@b> [y](#z) [z](/q)'),
        ('`[x](javascript:a)`', '`[x](javascript:a)`'),
        ('$5 or $6', '\\$5 or \\$6'),
        ('costs $5', 'costs \\$5'),
        ('$x$ and $a + b$', '$x$ and $a + b$'),
        ('$$\nx^2\n$$', '$$\nx^2\n$$'),
        ('US$ 5, $ 6 $', 'US\\$ 5, \\$ 6 \\$'),
        ('\\$5 and $y$', '\\$5 and $y$'),
        ('', ''),
        # HTML, in a line and as a block, whose Markdown counts once it is text
        ('<b>x</b> a<!-- y -->b 1 < 2', '\\<b>x\\</b> a\\<!-- y -->b 1 < 2'),
        ('<div>\n![x](u)\n</div>', '\\<div>\n\\![x](u)\n\\</div>'),
        ('`<b>`\n\n    <i>\n', '`<b>`\n\n    <i>\n'),
        # nested
        ('[![x](u)](https://a)', '[\\![x](u)](https://a)'),
        ('![a ![b](c)](d)', '\\![a \\![b](c)](d)'),
        ('> - ![x](u)\n>   ![y](u)\n> # ![z](u) #', '> - \\![x](u)\n>   \\![y](u)\n> # \\![z](u) #'),
        ('> ![x](u)\nlazy ![y](u)', '> \\![x](u)\nlazy \\![y](u)'),
        ('- a\n\n\t![x](u)\n\n      ![code](u)', '- a\n\n\t\\![x](u)\n\n      ![code](u)'),
        ('a ![x](u)\n===', 'a \\![x](u)\n==='),
        ('**_~~![x](u)~~_**', '**_~~\\![x](u)~~_**'),
        ('[a\n b]: <javascript:a>', '[a\n b]\\: \\<javascript:a>'),
        ('[x](java&#115;cript:a)', '[x]\\(java&#115;cript:a)'),
        ('[x][y]\n\n[y]: data:a\n[y]: vbscript:b', '[x][y]\n\n[y]\\: data:a\n[y]\\: vbscript:b'),
        # a bar ends a cell of a table even in code
        (
            '| `a\\|b` | ![x](u) |\n|---|---|\n| `a | ![x](u) ` |\n| b\\|c ![x](u) | d |',
            '| `a\\|b` | \\![x](u) |\n|---|---|\n| `a | \\![x](u) ` |\n| b\\|c \\![x](u) | d |',
        ),
        # what Streamlit's parser knows beyond CommonMark: footnotes, directives, blocks of formulas
        ('[^1]: ![x](u)\n\n    ![y](u)', '[^1]\\: \\![x](u)\n\n    ![y](u)'),
        (':::a\n```\n:::\n![x](u)\n```', '\\:\\:\\:a\n```\n:::\n![x](u)\n```'),
        (':a{b="`"} ![x](u) `', '\\:a{b="`"} ![x](u) `'),  # an attribute of a directive, else a piece of code
        (':red[x] 12:30 a: b ::', '\\:red[x] 12:30 a: b ::'),
        ('$$\na\n$$ b\n\n```\n$$\n![x](u)\n```', '\\$\\$\na\n\\$\\$ b\n\n```\n$$\n![x](u)\n```'),
        ('$a\\$![x](u)$', '$a\\$\\![x](u)\\$'),  # a backslash does not keep a formula from its end
        ('$n![k](x)$ and $\\<x\\>$', '$n![k](x)$ and $\\<x\\>$'),
        ('$$a$$ b $$\nc\n$$', '$$a$$ b $$\nc\n$$'),
        ('> $$\n> ![x](u)\n> $$', '> $$\n> ![x](u)\n> $$'),
    ],
)
def test_images_odd_links_and_money_are_escaped_outside_code(text: str, shown: str) -> None:
    assert safe_markdown(text) == shown


def test_what_is_nested_too_deeply_is_shown_as_plain_text() -> None:
    text = '>' * 3000 + ' ![x](u)'
    assert safe_markdown(text) == plain_markdown(text)


def test_what_never_settles_is_shown_as_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, '_ROUNDS', 1)
    assert safe_markdown('a\n![x](u) *b*') == 'a  \n\\!\\[x\\]\\(u\\) \\*b\\*'


PIECES = (
    *'`~$!<>[]()*_#|\\:-+.&"^{}= \t\n', '![', '](', '![x](u)', '[x](javascript:a)', '[x]: u', '[^1]: ', '<b>', '<!--',
    '-->', '<div>', '</div>', '<a:b>', '```', '~~~', '$$', '\n\n', '\n> ', '\n- ', '\n1. ', '\n    ', '\n:::', ':a[',
    'text', '1', '|---|---|\n', '| a | b |\n', '\n===\n', '\\!', '<script>', 'https://a', '&#33;',
)  # fmt: skip
texts = st.lists(st.sampled_from(PIECES), max_size=40).map(''.join)


def tokens(text: str) -> list[Token]:
    """What CommonMark with tables makes of a text, links of every scheme included."""
    parser = MarkdownIt('commonmark').enable('table')
    parser.validateLink = lambda url: True  # type: ignore[method-assign]
    return [inner for token in parser.parse(text) for inner in (token, *(token.children or ()))]


@settings(max_examples=400, deadline=None)
@given(texts)
def test_no_image_html_or_odd_link_is_left(text: str) -> None:
    for token in tokens(safe_markdown(text.replace('$', ''))):  # which knows no formulas
        assert token.type not in ('image', 'html_inline', 'html_block')
        if token.type == 'link_open':
            assert not re.match(r'\s*(javascript|a):', str(token.attrs['href']))


@settings(max_examples=400, deadline=None)
@given(texts)
def test_only_backslashes_are_added(text: str) -> None:
    position = 0
    for char in safe_markdown(text):
        if text[position : position + 1] == char:
            position += 1
        else:
            assert char == '\\'
    assert position == len(text)


@settings(max_examples=200, deadline=None)
@given(texts)
def test_safe_text_stays_as_it_is(text: str) -> None:
    safe = safe_markdown(text)
    assert safe_markdown(safe) == safe


@settings(max_examples=100, deadline=None)
@given(texts)
def test_code_is_never_changed(text: str) -> None:
    code = f'~~~~py\n{text.replace("~", "")}\n~~~~\n'
    assert safe_markdown(code) == code
