"""Legal questions with the articles that answer them: `question`, `reference`, `answer`."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, no_longer
from xtuner.dataset.map_fns.systems import SYSTEM_TEMPLATE
from xtuner.dataset.map_fns.turns import one_turn


@map_fn('question', 'reference', 'answer', detect=no_longer)
def law_reference_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The articles precede the question; the answer is trained."""
    articles = example['reference']
    shown = '\n'.join(articles) if isinstance(articles, list) else articles
    question = f'请根据以下法条回答问题。\n法条：{shown}\n问题：{example["question"]}'
    return one_turn(example, question, example['answer'], system=SYSTEM_TEMPLATE['lawyer'])
