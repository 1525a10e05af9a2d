"""Colours: `description` and `color`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE


@map_fn('description', 'color')
def colors_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The description is given, the colour's code is trained."""
    return {
        'conversation': [
            {'system': SYSTEM_TEMPLATE['colorist'], 'input': example['description'], 'output': example['color']}
        ]
    }
