"""TinyCodes: `prompt` and `response`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, no_longer
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('prompt', 'response', detect=no_longer)
def tiny_codes_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The prompt is the question, with a programmer's system message; the response is trained."""
    return one_turn(example, example['prompt'], example['response'], system=SYSTEM_TEMPLATE['coder'])
