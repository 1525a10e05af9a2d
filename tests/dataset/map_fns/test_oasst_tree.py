"""OpenAssistant: trees of messages."""

from __future__ import annotations

import json

import pytest

import xtuner.dataset.map_fns as map_fns
from tests.dataset.map_fns.test_registration import texts
from xtuner.dataset.conversation import to_conversation

pytestmark = pytest.mark.unit


def node(text, role='assistant', rank=None, replies=()):
    return {'text': text, 'role': role, 'rank': rank, 'replies': list(replies)}


TREE = {'prompt': node('q', 'prompter', replies=[
    node('a1', rank=1, replies=[node('q3', 'prompter')]),
    node('a0', rank=0, replies=[node('q2', 'prompter', replies=[node('b1', rank=1), node('b0', rank=0),
                                                              {**node('gone', rank=-1), 'deleted': True}])]),
    node('unranked'),
])}  # fmt: skip


def test_the_best_path_of_a_tree_takes_the_lowest_rank():
    assert texts('oasst_tree', TREE) == [[('user', 'q'), ('assistant', 'a0'), ('user', 'q2'), ('assistant', 'b0')]]
    assert texts('oasst_tree', {'prompt': node('q', 'prompter')}) == []


def test_all_paths_of_a_tree_train_each_answer_once():
    conversations = [to_conversation(found) for found in map_fns.oasst_tree_all_map_fn(TREE)]
    paths = [[message.content for message in conversation.messages] for conversation in conversations]
    assert paths == [['q', 'a1'], ['q', 'a0', 'q2', 'b1'], ['q', 'a0', 'q2', 'b0'], ['q', 'unranked']]
    trained = [m.content for c in conversations for m in c.messages if m.role == 'assistant' and m.loss is not False]
    assert sorted(trained) == ['a0', 'a1', 'b0', 'b1', 'unranked']


def test_a_deep_tree_needs_no_deep_stack_for_its_best_path():
    tree = node('end')
    for depth in range(5000):
        tree = node('x', 'prompter' if depth % 2 == 0 else 'assistant', replies=[tree])
    assert len(map_fns.oasst_tree_map_fn({'prompt': tree})['messages']) >= 5000


@pytest.mark.real
def test_every_tree_of_openassistant_has_a_best_path(shared_data):
    for number, line in enumerate((shared_data / 'oasst_en_100_trees.jsonl').open(encoding='utf-8')):
        record = json.loads(line)
        [best] = texts('oasst_tree', record, f'{number}')
        everything = texts('oasst_tree_all', record)
        assert best in everything and best[-1][0] == 'assistant'
