"""Alpaca: `instruction`, an optional `input`, `output`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn

# Published versions of Alpaca mark instructions that have no sensible answer with this.
_NO_OUTPUT = '<nooutput>'


@map_fn('instruction', 'output')
def alpaca_map_fn(example: dict[str, Any]) -> dict[str, Any] | None:
    """Joins `instruction` and `input`, where there is one, with a line break."""
    if example['output'] == _NO_OUTPUT:
        return None
    return {
        'conversation': [{'input': join(example['instruction'], example.get('input')), 'output': example['output']}]
    }


def join(instruction: Any, context: Any) -> Any:
    """Returns the instruction, and below it the text it is about, where there is one."""
    return f'{instruction}\n{context}' if isinstance(instruction, str) and context else instruction
