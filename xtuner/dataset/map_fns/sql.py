"""SQL: tables as `context`, a `question`, and the query as `answer`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE


@map_fn('context', 'question', 'answer')
def sql_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Tables and question are given, the query is trained."""
    return {
        'conversation': [
            {
                'system': SYSTEM_TEMPLATE['sql'],
                'input': f'{example["context"]}\n{example["question"]}',
                'output': example['answer'],
            }
        ]
    }
