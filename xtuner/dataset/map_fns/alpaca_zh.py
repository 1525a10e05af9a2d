"""Alpaca in Chinese: `instruction_zh`, an optional `input_zh`, `output_zh`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import join, one_turn


@map_fn('instruction_zh', 'output_zh')
def alpaca_zh_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Joins instruction and input, if there is one, with a line break."""
    return one_turn(example, join(example['instruction_zh'], example.get('input_zh')), example['output_zh'])
