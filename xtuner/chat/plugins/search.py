"""A web search through a service of the user's: Serper's HTTP interface, or one that speaks it.

The key comes from the environment, goes into a header of that one request, and nowhere else.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from xtuner.chat.plugins.base import PluginError
from xtuner.errors import UsageError

KEY, URL = 'SERPER_API_KEY', 'XTUNER_SEARCH_URL'
_SERVICE = 'https://google.serper.dev/search'
_SECONDS = 10
_MOST_BYTES = 2**20  # of a response
_MOST_RESULTS = 3
_MOST_CHARACTERS = 300  # of one result, and of a query
_LOOPBACK = ('localhost', '127.0.0.1', '::1')


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Where the key goes is the user's choice, not the service's."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        """Follows none."""


class Search:
    """`Search("capital of France")` is the first few results, numbered.

    Args:
        key: Of the service.
        url: Where it is.
        seconds: Most that one search may take.
    """

    name, argument = 'Search', 'query'

    def __init__(self, key: str, url: str = _SERVICE, seconds: float = _SECONDS) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == 'https' or (parts.scheme == 'http' and parts.hostname in _LOOPBACK)
        if not secure or not parts.hostname:
            raise UsageError(f'{URL} must be an https address, or http on this machine; got {url!r}')
        self._key, self._url, self._seconds = key, url, seconds
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __repr__(self) -> str:
        return f'Search({self._url!r})'  # without the key

    @classmethod
    def from_environment(cls) -> Search:
        """With the key of the environment. Raises UsageError where there is none."""
        key = os.environ.get(KEY, '').strip()
        if not key:
            raise UsageError(
                f'the search plugin needs a key in the environment: {KEY}=... (of serper.dev, or of a service that '
                f'answers as it does at {URL})'
            )
        return cls(key, os.environ.get(URL) or _SERVICE)

    def run(self, argument: str) -> str:
        """The first results, a line each. Raises PluginError where there are none."""
        query = argument.strip()[:_MOST_CHARACTERS]
        if not query:
            raise PluginError('the query is empty')
        snippets = [_line(entry.get('snippet') or entry.get('title')) for entry in self._entries(query)]
        lines = [f"<|{number}|>: '{line}'" for number, line in enumerate(filter(None, snippets), 1)]
        if not lines:
            raise PluginError('nothing was found')
        return '\n'.join(lines[:_MOST_RESULTS])

    def _entries(self, query: str) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            self._url,
            data=json.dumps({'q': query}).encode(),
            headers={'X-API-KEY': self._key, 'Content-Type': 'application/json'},
        )
        try:
            with self._opener.open(request, timeout=self._seconds) as response:
                body = response.read(_MOST_BYTES + 1)
        except urllib.error.HTTPError as error:
            why = f'; is {KEY} right?' if error.code in (401, 403) else ''
            raise PluginError(f'the search service answered with status {error.code}{why}') from None
        except (OSError, HTTPException):
            raise PluginError(f'the search service was not reached within {self._seconds:g} s') from None
        if len(body) > _MOST_BYTES:
            raise PluginError(f'the search service answered with more than {_MOST_BYTES} bytes')
        try:
            entries = json.loads(body)['organic']
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PluginError('the search service answered with something else than results') from None
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _line(text: Any) -> str:
    line = ' '.join(str(text or '').split())
    return line if len(line) <= _MOST_CHARACTERS else line[: _MOST_CHARACTERS - 1] + '…'
