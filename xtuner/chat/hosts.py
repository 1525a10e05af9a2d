"""Host name checks of the web page and the HTTP service, against DNS rebinding.

A web site can let its own name resolve to 127.0.0.1 after its page has been loaded; the browser then treats a local
service as part of that site. The header `Host` reveals the name.
"""

from __future__ import annotations

import re
from collections.abc import Collection

_HOST = re.compile(r'(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\s:\[\]]+))(?::\d*)?')
LOOPBACK = frozenset({'localhost', '127.0.0.1', '::1'})


def host_name(header: str) -> str:
    """The name in a `Host` header, without port and brackets, in lower case; '' if the header is malformed."""
    match = _HOST.fullmatch(header.strip().lower())
    return '' if match is None else match['address'] or match['name'] or ''


def is_allowed_host(header: str, names: Collection[str]) -> bool:
    """Whether a `Host` header contains one of the names, given in lower case; an empty one never does."""
    return host_name(header) in names
