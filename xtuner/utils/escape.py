"""Text from files, models and clients as a terminal may show it: `printable` is the one function for that."""

from __future__ import annotations

import logging

# What a terminal obeys: C0 (but line breaks and tabs) and DEL as Unicode's pictures of them, such as ␛ for escape.
_SIGNS: dict[int, int | str] = {code: 0x2400 + code for code in range(32) if chr(code) not in '\n\t'}
_SIGNS[0x7F] = 0x2421
# C1, in which one character begins a command; and what turns the direction of the text around it.
_SIGNS |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_SIGNS |= {code: f'\\u{code:04x}' for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)}


def printable(text: str) -> str:
    r"""Returns a text in which signs stand for what would move the cursor, set colors or turn the text around.

    >>> printable('a\x1b[31mb\u202ec')
    'a␛[31mb\\u202ec'
    """
    return text.translate(_SIGNS)


class PrintableFormatter(logging.Formatter):
    """Lines of a log, which name files, models and what is in them."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        return printable(super().format(record))
