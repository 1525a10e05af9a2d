"""Medical questions: `instruction`, an optional `input`, `output`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, never
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE
from xtuner.dataset.map_fns.turns import join, one_turn


@map_fn('instruction', 'output', detect=never)
def medical_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The instruction is the question, with a doctor's system message; the output is trained."""
    question = join(example['instruction'], example.get('input'))
    return one_turn(example, question, example['output'], system=SYSTEM_TEMPLATE['medical'])
