"""What a client can do wrong, in OpenAI's error form."""

from __future__ import annotations

from typing import Any


class APIError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        message: What is wrong and what to do.
        param: The field of the request, if one is at fault.
        code: OpenAI's word for it, if there is one.
        headers: Further headers of the response.
        unread: Whether the body of the request may still be on its way.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        unread: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.unread = headers or {}, unread

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        kinds = {401: 'authentication_error', 429: 'rate_limit_error'}
        kind = kinds.get(self.status, 'invalid_request_error' if self.status < 500 else 'server_error')
        return {'error': {'message': self.message, 'type': kind, 'param': self.param, 'code': self.code}}


def wrong(param: str, message: str, code: str | None = None) -> APIError:
    """A field that is wrong: status 400."""
    return APIError(400, message, param=param, code=code)
