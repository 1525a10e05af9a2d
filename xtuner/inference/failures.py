"""What a client reads where the model failed on its answer."""

from __future__ import annotations

from xtuner.utils.out_of_memory import is_out_of_memory

BROKEN = 'the model failed, and fails again on every token; ask again later, or have the service restarted'
_FAILED = 'the model failed on this answer; try again'
_NOT_FINITE = 'the model computed NaN or infinity in place of logits; its weights or its adapter are damaged'
_OUT_OF_MEMORY = 'the service ran out of memory during this answer; try again later, or ask for a shorter one'


class NotFinite(ArithmeticError):
    """Logits that hold NaN or infinity."""


def failure_message(error: BaseException) -> str:
    """One line for the client, which holds nothing of the error's own text: that might quote another's prompt."""
    if isinstance(error, NotFinite):
        return _NOT_FINITE
    return _OUT_OF_MEMORY if is_out_of_memory(error) else _FAILED
