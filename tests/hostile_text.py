"""Text as a stranger's file may hold it, and what must not be left of it where it is shown."""

from __future__ import annotations

COMMANDS = '\x1b[31mred\x1b]0;title\x07\x1b]8;;http://evil.example\x1b\\link\x9b2Jclear\x85\u202eback\u202c\u2066aside\u2069\r\x08\x7f'
MARKUP = (
    '</p><script>alert(1)</script><img src=http://evil.example/i.png onerror=alert(2)>'
    '![i](http://evil.example/i.png)[l](javascript:alert(3))<http://evil.example> http://evil.example www.evil.example '
    '`c` $x$ :red[y] &lt;b&gt; a@evil.example'
)
FRONT_MATTER = '\n---\nlicense: mit\nbase_model: evil/evil\n---\n# Heading\n- item'
HOSTILE = COMMANDS + MARKUP + FRONT_MATTER

_OBEYED = {
    *map(chr, range(32)),
    *map(chr, range(0x7F, 0xA0)),
    *'\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069',
}


def obeyed(text: str, *, allowed: str = '\n\t') -> list[str]:
    """The characters of a text that a terminal obeys, or that turn the text around them."""
    return sorted({char for char in text if char in _OBEYED and char not in allowed})
