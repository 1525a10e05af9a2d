"""Medical questions: `instruction`, an optional `input`, `output`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.alpaca import join
from xtuner.dataset.map_fns.registration import map_fn, never
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE


@map_fn('instruction', 'output', detect=never)
def medical_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The question is asked of a doctor, the answer is trained."""
    question = join(example['instruction'], example.get('input'))
    return {'conversation': [{'system': SYSTEM_TEMPLATE['medical'], 'input': question, 'output': example['output']}]}
