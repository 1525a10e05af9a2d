"""Errors that are returned to clients, in OpenAI's error format."""

from __future__ import annotations

from typing import Any


class APIError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: What is wrong and what to do.
        param: The invalid field of the request, if any.
        code: OpenAI's error code, if any.
        headers: Additional headers of the response.
        unread: Whether the body of the request may not have been read completely.
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
        """The JSON body of the response."""
        types = {401: 'authentication_error', 429: 'rate_limit_error'}
        type_ = types.get(self.status, 'invalid_request_error' if self.status < 500 else 'server_error')
        return {'error': {'message': self.message, 'type': type_, 'param': self.param, 'code': self.code}}


def invalid(param: str, message: str, code: str | None = None) -> APIError:
    """The error for an invalid field: status 400."""
    return APIError(400, message, param=param, code=code)
