"""Formats a text table with aligned columns, wrapped cells, and correct widths of Chinese characters."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

GAP = ' | '


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, cell_width: int = 28) -> str:
    """Formats rows under a header, with a rule between rows.

    Args:
        header: Names of the columns.
        rows: Cells of each row, as many as in the header.
        cell_width: Maximum width of a cell in terminal columns.

    Returns:
        The table, without a newline at the end.
    """
    wrapped = [[wrap(cell, cell_width) for cell in row] for row in [header, *rows]]
    widths = [max(display_width(line) for cell in column for line in cell) for column in zip(*wrapped, strict=True)]
    rule = '-+-'.join('-' * width for width in widths)
    blocks = ['\n'.join(_lines_of(row, widths)) for row in wrapped]
    return f'\n{rule}\n'.join(blocks)


def wrap(text: str, width: int) -> list[str]:
    """Wraps a text at `width` terminal columns, between words, or within a word that is too long."""
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
    """Width of a text in terminal columns: two for wide East Asian characters, one for others."""
    return sum(2 if unicodedata.east_asian_width(char) in 'WF' else 1 for char in text)


def _lines_of(row: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    height = max(map(len, row))
    padded = [[*cell, *[''] * (height - len(cell))] for cell in row]
    return [
        GAP.join(text + ' ' * (width - display_width(text)) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]
