"""CrimeKgAssitant: `input` and `output`, questions to a lawyer."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, never
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('input', 'output', detect=never)
def crime_kg_assitant_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The input is the question, with a lawyer's system message; the output is trained."""
    return one_turn(example, example['input'], example['output'], system=SYSTEM_TEMPLATE['lawyer'])
