"""The listen address and the names of the served models, checked before torch is imported."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner.errors import UsageError

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class Address:
    """The listen address and its access control.

    Attributes:
        host: Address to listen on.
        port: Port; 0 selects a free one.
        loopback: Whether the address is reachable from this machine only.
        api_key: The required API key; '' if none is required.
    """

    host: str
    port: int
    loopback: bool
    api_key: str = ''


def warn_if_exposed(address: Address) -> None:
    """Logs who can use a service that is reachable from other machines."""
    if address.loopback:
        return
    users = 'with the API key' if address.api_key else 'WITHOUT AN API KEY, by anyone who can reach it'
    logger.warning('listening on %s: the service can be used from other machines %s; the traffic is not encrypted',
                   address.host, users)  # fmt: skip


def base_name_of(llm: str) -> str:
    """The name of the base model: the last component of its folder or hub id."""
    return llm.rstrip('/').rsplit('/', 1)[-1]


def name_adapters(words: Sequence[str], base: str) -> dict[str, Path]:
    """Parses `[NAME=]FOLDER`; the default name is that of the folder.

    Raises:
        UsageError: a name is used twice, or is the name of the base model.
    """
    adapters: dict[str, Path] = {}
    for word in words:
        name, equals, folder = word.partition('=')
        path = Path(folder if equals else word)
        name = name if equals else path.resolve().name
        if not name or name in adapters or name == base:
            raise UsageError(f'--adapter {word}: the name {name!r} is already used; set one with --adapter NAME={path}')
        adapters[name] = path
    return adapters
