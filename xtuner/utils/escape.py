"""Escapes untrusted text for a terminal: `printable` is the only function for that."""

from __future__ import annotations

# Control characters C0 (except line breaks and tabs) and DEL as Unicode's control pictures, such as ␛ for escape.
_SIGNS: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in '\n\t'}
_SIGNS[0x7F] = 0x2421
# C1, where one character starts a command, and characters that change the text direction.
_SIGNS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SIGNS |= {code: f'\\u{code:04x}' for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)}


def printable(text: str) -> str:
    r"""Returns a text with visible substitutes for characters that move the cursor, set colors or change direction.

    >>> printable('a\x1b[31mb\u202ec')
    'a␛[31mb\\u202ec'
    """
    return text.translate(_SIGNS)
