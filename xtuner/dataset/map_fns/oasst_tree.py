"""OpenAssistant's original format: one tree of messages per record, with nested, ranked replies.

    prompt ─┬─ answer, rank 0 ── question ─┬─ answer, rank 1
            └─ answer, rank 1              └─ answer, rank 0

The best path takes the reply with the lowest rank at each step; `oasst_tree_all` takes every path to an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.dataset.map_fns.registration import map_fn, never
from xtuner.dataset.map_fns.turns import training_fields
from xtuner.errors import DataError

_ROLES = {'prompter': 'user', 'assistant': 'assistant'}


def _is_tree(record: Any) -> bool:
    return isinstance(record.get('prompt'), Mapping) and 'replies' in record['prompt']


@map_fn('prompt', detect=_is_tree)
def oasst_tree_map_fn(example: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the best-ranked path, without a final unanswered question; None if the tree has no answer."""
    path = [_message(example['prompt'])]
    node = example['prompt']
    while replies := _replies(node):
        node = min(replies, key=_preference)
        path.append(_message(node))
    if path[-1]['role'] == 'user':
        path.pop()
    return {'messages': path} if path else None


@map_fn('prompt', detect=never)
def oasst_tree_all_map_fn(example: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns every path to a final answer. An answer on several paths is trained only in the first of them."""
    trained: set[int] = set()
    conversations = []
    for path in _paths(example['prompt'], []):
        messages = []
        for node in path:
            messages.append({**_message(node), **({'loss': False} if id(node) in trained else {})})
            trained.add(id(node))
        conversations.append({'messages': messages})
    return conversations


def _preference(reply: Mapping[str, Any]) -> tuple[bool, bool, int]:
    """Sort key: by rank, unranked replies after them, and unanswered questions last, since the path would end there."""
    rank = reply.get('rank')
    unanswered = reply.get('role') == 'prompter' and not _replies(reply)
    return unanswered, not isinstance(rank, int), rank if isinstance(rank, int) else 0


def _paths(node: Mapping[str, Any], path: list[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    path = [*path, node]
    below = [longer for reply in _replies(node) for longer in _paths(reply, path)]
    if below:
        yield from below
    elif _message(node)['role'] == 'assistant':
        yield path


def _replies(node: Any) -> list[Mapping[str, Any]]:
    replies = node.get('replies') or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise DataError('`replies` must be a list of messages')
    return [reply for reply in replies if not reply.get('deleted') and reply.get('text')]


def _message(node: Any) -> dict[str, Any]:
    if not isinstance(node, Mapping) or node.get('role') not in _ROLES or not isinstance(node.get('text'), str):
        raise DataError('a message of the tree must have a `text`, and the `role` prompter or assistant')
    return {**training_fields(node, ('role', 'text')), 'role': _ROLES[node['role']], 'content': node['text']}
