"""Quantities as text for a person: sizes, durations, counts."""

from __future__ import annotations

GIB = 2**30


def gib(num_bytes: float) -> str:
    """'1.23 GiB', and small sizes in MiB."""
    return f'{num_bytes / GIB:.2f} GiB' if num_bytes >= GIB / 10 else f'{num_bytes / 2**20:.0f} MiB'


def clock(seconds: float) -> str:
    """'3 h 20 min' for 12,000 seconds, '45 s' below a minute."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f'{seconds:.0f} s'
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes} min' if hours else f'{minutes} min'
