"""Colours: `description` and `color`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, no_longer
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('description', 'color', detect=no_longer)
def colors_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The description is the question; the colour's code is trained."""
    return one_turn(example, example['description'], example['color'], system=SYSTEM_TEMPLATE['colorist'])
