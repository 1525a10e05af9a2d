"""Alpaca in Chinese: `instruction_zh`, an optional `input_zh`, `output_zh`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.alpaca import join
from xtuner.dataset.map_fns.registration import map_fn


@map_fn('instruction_zh', 'output_zh')
def alpaca_zh_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Joins instruction and input, where there is one, with a line break."""
    question = join(example['instruction_zh'], example.get('input_zh'))
    return {'conversation': [{'input': question, 'output': example['output_zh']}]}
