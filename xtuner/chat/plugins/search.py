"""A web search with Serper's HTTP API or a compatible service.

The key is read from the environment and sent only in a header of the search request.
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
_MAX_BYTES = 2**20  # of a response
_MAX_RESULTS = 3
_MAX_CHARACTERS = 300  # of one result, and of a query
_LOOPBACK = ('localhost', '127.0.0.1', '::1')


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, so that the key is sent only to the URL chosen by the user."""

    def redirect_request(self, *args: Any, **keywords: Any) -> None:
        """Returns None: no redirect is followed."""


class Search:
    """`Search("capital of France")` returns the first results, numbered.

    Args:
        key: API key of the service.
        url: URL of the service.
        seconds: Timeout of one search.
    """

    name, argument = 'Search', 'query'

    def __init__(self, key: str, url: str = _SERVICE, seconds: float = _SECONDS) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == 'https' or (parts.scheme == 'http' and parts.hostname in _LOOPBACK)
        if not secure or not parts.hostname:
            raise UsageError(f'{URL} must be an https URL, or http on this machine; got {url!r}')
        self._key, self._url, self._seconds = key, url, seconds
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __repr__(self) -> str:
        return f'Search({self._url!r})'  # without the key

    @classmethod
    def from_environment(cls) -> Search:
        """Creates the plugin with the key in the environment. Raises UsageError if there is none."""
        key = os.environ.get(KEY, '').strip()
        if not key:
            raise UsageError(
                f'the search plugin needs a key in the environment: {KEY}=... (for serper.dev, or for a compatible '
                f'service at {URL})'
            )
        return cls(key, os.environ.get(URL) or _SERVICE)

    def run(self, argument: str) -> str:
        """The first results, one per line. Raises PluginError if there are none."""
        query = argument.strip()[:_MAX_CHARACTERS]
        if not query:
            raise PluginError('the query is empty')
        snippets = [_line(entry.get('snippet') or entry.get('title')) for entry in self._entries(query)]
        lines = [f"<|{number}|>: '{line}'" for number, line in enumerate(filter(None, snippets), 1)]
        if not lines:
            raise PluginError('no results')
        return '\n'.join(lines[:_MAX_RESULTS])

    def _entries(self, query: str) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            self._url,
            data=json.dumps({'q': query}).encode(),
            headers={'X-API-KEY': self._key, 'Content-Type': 'application/json'},
        )
        try:
            with self._opener.open(request, timeout=self._seconds) as response:
                body = response.read(_MAX_BYTES + 1)
        except urllib.error.HTTPError as error:
            hint = f'; check {KEY}' if error.code in (401, 403) else ''
            raise PluginError(f'the search service returned status {error.code}{hint}') from None
        except (OSError, HTTPException):
            raise PluginError(f'the search service did not respond within {self._seconds:g} s') from None
        if len(body) > _MAX_BYTES:
            raise PluginError(f'the search service returned more than {_MAX_BYTES} bytes')
        try:
            entries = json.loads(body)['organic']
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PluginError('the search service returned an unexpected response') from None
        return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _line(text: Any) -> str:
    line = ' '.join(str(text or '').split())
    return line if len(line) <= _MAX_CHARACTERS else line[: _MAX_CHARACTERS - 1] + '…'
