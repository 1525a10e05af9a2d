"""A table of texts in aligned columns, long cells wrapped, Chinese characters counted as wide as they are."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

GAP = ' | '


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, cell_width: int = 28) -> str:
    """Lay out rows under a header, a rule between rows.

    Args:
        header: the names of the columns.
        rows: the cells of each row, as many as the header has.
        cell_width: most columns of the terminal that one cell may take.

    Returns:
        The lines, joined; no newline at the end.
    """
    wrapped = [[wrap(cell, cell_width) for cell in row] for row in [header, *rows]]
    widths = [max(display_width(line) for cell in column for line in cell) for column in zip(*wrapped, strict=True)]
    rule = '-+-'.join('-' * width for width in widths)
    blocks = ['\n'.join(_lines_of(row, widths)) for row in wrapped]
    return f'\n{rule}\n'.join(blocks)


def wrap(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` terminal columns: between words, or inside one that is too long."""
    lines = ['']
    for word in text.split(' '):
        joined = f'{lines[-1]} {word}' if lines[-1] else word
        if display_width(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append('')
        for char in word:
            if display_width(lines[-1] + char) > width:
                lines.append('')
            lines[-1] += char
    return lines


def display_width(text: str) -> int:
    """Columns that a text takes in a terminal: two for wide East Asian characters, one for others."""
    return sum(2 if unicodedata.east_asian_width(char) in 'WF' else 1 for char in text)


def _lines_of(row: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    height = max(map(len, row))
    padded = [[*cell, *[''] * (height - len(cell))] for cell in row]
    return [
        GAP.join(text + ' ' * (width - display_width(text)) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]
