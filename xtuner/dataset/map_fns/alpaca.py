"""Alpaca: `instruction`, an optional `input`, `output`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import join, one_turn

# Published versions of Alpaca mark instructions without a sensible answer with this.
_NO_OUTPUT = '<nooutput>'


@map_fn('instruction', 'output')
def alpaca_map_fn(example: dict[str, Any]) -> dict[str, Any] | None:
    """Joins `instruction` and `input`, if there is one, with a line break."""
    if example['output'] == _NO_OUTPUT:
        return None
    return one_turn(example, join(example['instruction'], example.get('input')), example['output'])
