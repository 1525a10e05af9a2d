"""Stack Exchange: `question` and `response`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn


@map_fn('question', 'response')
def stack_exchange_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The question is asked, the response is trained."""
    return {'conversation': [{'input': example['question'], 'output': example['response']}]}
