"""The plain form: `input` and `output`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('input', 'output')
def default_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The input is the question; the output is trained."""
    return one_turn(example, example['input'], example['output'])
