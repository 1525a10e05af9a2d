"""TinyCodes: `prompt` and `response`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE


@map_fn('prompt', 'response')
def tiny_codes_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The prompt is asked of a programmer, the response is trained."""
    return {
        'conversation': [
            {'system': SYSTEM_TEMPLATE['coder'], 'input': example['prompt'], 'output': example['response']}
        ]
    }
