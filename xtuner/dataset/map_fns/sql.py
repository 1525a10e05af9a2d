"""SQL: tables as `context`, a `question`, and the query as `answer`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, no_longer
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('context', 'question', 'answer', detect=no_longer)
def sql_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Tables and question are given; the query is trained."""
    return one_turn(
        example, f'{example["context"]}\n{example["question"]}', example['answer'], system=SYSTEM_TEMPLATE['sql']
    )
