"""GSM8K, and every other data set of `question` and `answer`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('question', 'answer')
def gsm8k_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The question is given; the answer is trained."""
    return one_turn(example, example['question'], example['answer'])
