"""Where the service listens and how its models are called: checked before torch is imported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner.errors import UsageError

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class Address:
    """Where the service listens, and to whom.

    Attributes:
        host: Address to listen at.
        port: Port; 0 takes a free one.
        loopback: Whether that address is reached from this machine alone.
        api_key: What clients must show; '' for nothing.
    """

    host: str
    port: int
    loopback: bool
    api_key: str = ''


def warn_of_strangers(address: Address) -> None:
    """Says who can reach an address that is not of this machine alone."""
    if address.loopback:
        return
    guard = 'whoever reaches it and knows the API key'
    if not address.api_key:
        guard = 'WITHOUT AN API KEY, so whoever reaches it'
    logger.warning('listening at %s, not on this machine alone, %s can use it; the traffic is not encrypted',
                   address.host, guard)  # fmt: skip


def base_name_of(llm: str) -> str:
    """The name of the base: the last part of its folder or hub id."""
    return llm.rstrip('/').rsplit('/', 1)[-1]


def name_adapters(words: Sequence[str], base: str) -> dict[str, Path]:
    """Reads `[NAME=]FOLDER`; the name left out is the folder's own.

    Raises:
        UsageError: a name is used twice, or is the base's.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition('=')
        path = Path(folder if equals else word)
        name = name if equals else path.resolve().name
        if not name or name in found or name == base:
            raise UsageError(f'--adapter {word}: the name {name!r} is taken; give another: --adapter NAME={path}')
        found[name] = path
    return found
