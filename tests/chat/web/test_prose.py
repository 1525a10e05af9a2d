"""What an answer may make the page draw."""

from __future__ import annotations

import pytest

from xtuner.chat.web.prose import safe_markdown


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
    ],
)
def test_images_odd_links_and_money_are_escaped_outside_code(text: str, shown: str) -> None:
    assert safe_markdown(text) == shown
