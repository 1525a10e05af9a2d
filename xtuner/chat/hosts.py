"""Which names a service on this machine answers to: the guard of the page and of the HTTP service.

A web site can point its own name at 127.0.0.1, after its page is loaded; its reader's browser then takes the service
for a part of that site. What gives it away is the name, in the header `Host`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_HOST = re.compile(r'(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\s:\[\]]+))(?::\d*)?')
LOOPBACK = frozenset({'localhost', '127.0.0.1', '::1'})


def host_name(header: str) -> str:
    """The name in a `Host` header: without port and brackets, in lower case; '' where it has another form."""
    found = _HOST.fullmatch(header.strip().lower())
    return '' if found is None else found['address'] or found['name'] or ''


def is_called(header: str, names: Collection[str]) -> bool:
    """Whether a `Host` header holds one of the names, which are in lower case; an empty or missing one does not."""
    return host_name(header) in names
