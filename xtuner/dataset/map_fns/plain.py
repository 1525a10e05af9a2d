"""Generic question and answer columns, without an added system text; used by format detection."""

from __future__ import annotations

from typing import Any

from xtuner.dataset.map_fns.registration import map_fn
from xtuner.dataset.map_fns.turns import join, one_turn


@map_fn('prompt', 'completion')
def prompt_completion_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The prompt is the question; the completion is trained."""
    return one_turn(example, example['prompt'], example['completion'])


@map_fn('prompt', 'response')
def prompt_response_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The prompt is the question; the response is trained."""
    return one_turn(example, example['prompt'], example['response'])


@map_fn('instruction', 'response')
def instruction_response_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """Joins `instruction` and `input` or `context`, if there is one, with a line break."""
    question = join(example['instruction'], example.get('input') or example.get('context'))
    return one_turn(example, question, example['response'])


@map_fn('context', 'question', 'answer')
def context_question_answer_map_fn(example: dict[str, Any]) -> dict[str, Any]:
    """The context, followed by the question, is given; the answer is trained."""
    parts = [part for part in (example['context'], example['question']) if part]
    return one_turn(example, join(parts[0], parts[1]) if len(parts) == 2 else example['question'], example['answer'])
