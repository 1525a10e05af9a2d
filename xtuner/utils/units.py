"""Formats quantities for people: sizes, durations, counts."""

from __future__ import annotations

GIB = 2**30


def gib(num_bytes: float) -> str:
    """Formats memory and free space in binary units: '1.23 GiB', or '84 MiB' below 0.1 GiB."""
    return f'{num_bytes / GIB:.2f} GiB' if num_bytes >= GIB / 10 else f'{num_bytes / 2**20:.0f} MiB'


def gigabytes(num_bytes: float) -> str:
    """Formats file sizes in decimal units, as model hubs and `--max-shard-size` count them: '14.6 GB', '8.4 MB'."""
    return f'{num_bytes / 1e9:.1f} GB' if num_bytes >= 10**9 else f'{num_bytes / 1e6:.1f} MB'


def compact(number: float) -> str:
    """Formats a large number with three digits: '1.23 M' for 1,234,567, '2.5 B', '12.3 k'; '950' below 10,000."""
    for size, unit, scale in ((1e9, 'B', 1e9), (1e6, 'M', 1e6), (1e4, 'k', 1e3)):
        if number >= size:
            return f'{number / scale:.3g} {unit}'
    return f'{number:,.0f}'


def counted(number: int, noun: str) -> str:
    """Formats a count with its noun: '1 pack', '1,200 packs'."""
    return f'{number:,} {noun}{"" if number == 1 else "s"}'


def duration(seconds: float) -> str:
    """Formats a duration for text: '2 h 05 min', '20 min', '3 min 20 s', '12.3 s'."""
    if seconds < 59.95:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02} min'
    return f'{minutes} min' if minutes >= 10 else f'{minutes} min {rest:02} s'


def clock(seconds: float) -> str:
    """Formats a changing duration, such as an ETA: '1:02:03' for 3723 seconds, '0:00:09' for 9."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f'{hour}:{minute:02}:{second:02}'
