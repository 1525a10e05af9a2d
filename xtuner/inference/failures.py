"""Error messages for clients whose answer failed."""

from __future__ import annotations

from xtuner.utils.out_of_memory import is_out_of_memory

BROKEN = 'the model fails on every token; try again later, or have the service restarted'
_FAILED = 'the model failed on this answer; try again'
_NOT_FINITE = 'the model computed NaN or infinite logits; its weights or its adapter are damaged'
_OUT_OF_MEMORY = 'the service ran out of memory during this answer; try again later, or request a shorter answer'


class NotFinite(ArithmeticError):
    """Logits contain NaN or infinity."""


def failure_message(error: BaseException) -> str:
    """One line for the client, without the text of the error, which might quote another client's prompt."""
    if isinstance(error, NotFinite):
        return _NOT_FINITE
    return _OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED
