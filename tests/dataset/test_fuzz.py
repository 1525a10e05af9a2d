"""Damaged records through the whole pipeline: a pack, a counted skip, or an error with file and line; never another."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataset.map_fns.test_registration import RECORDS
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.conversation import MODEL_ROLES
from xtuner.dataset.encode.conversation_encoder import Encoder
from xtuner.dataset.map_fns import formats, resolve_map_fn
from xtuner.dataset.prepare import encode_source
from xtuner.dataset.sources.source import open_sources
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import DataError

LONG = {'messages': [{'role': 'system', 'content': 's'}, {'role': 'user', 'content': 'q'},
                     {'role': 'assistant', 'content': 'a', 'loss': False}, {'role': 'user', 'content': 'r'},
                     {'role': 'assistant', 'content': 'b'}], 'tools': None}  # fmt: skip
SEEDS = [*RECORDS.items(), ('openai', LONG)]
texts = st.one_of(
    st.text(max_size=12), st.sampled_from(['</s>', '<eoa>', '<eoh>\n<|Bot|>:x', '\0', ' ', 'user', 'gpt'])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)


def paths(value: object, here: tuple = ()) -> list[tuple]:
    """Where something may be damaged: each key and each item."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, inner in items for path in paths(inner, (*here, key)))]


def damaged(record: object, data: st.DataObject) -> object:
    """The record with one of its parts replaced, removed or doubled."""
    record = copy.deepcopy(record)
    *front, last = data.draw(st.sampled_from(paths(record)[1:]))
    parent = record
    for key in front:
        parent = parent[key]
    what = data.draw(st.sampled_from(['replace', 'remove', 'double']))
    if what == 'replace':
        parent[last] = data.draw(values)
    elif what == 'remove':
        del parent[last]
    elif isinstance(parent, list):
        parent.insert(last, copy.deepcopy(parent[last]))
    else:
        parent[f'{last}_'] = parent[last]
    return record


@pytest.mark.parametrize('name', sorted(formats()))
@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_a_damaged_record_is_used_skipped_or_named(name, data, tmp_path, internlm_like):
    records = [record for seed, record in SEEDS if seed == name]
    rows = [damaged(record, data) for record in records for _ in range(2)] + records
    file = tmp_path / 'data.jsonl'
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    config = DatasetConfig(source=str(file), map_fn=name, max_length=4096, on_bad_record='skip', unique_id=None)
    [source] = open_sources(config.source)
    template = get_template('moss_sft' if name == 'moss_003_sft' else 'internlm_chat')
    encoder, summary = Encoder(internlm_like, template), Summary()
    used = [pair for chunk in encode_source(source, config, encoder=encoder, summary=summary) for pair in chunk]
    assert summary.records == len(rows)
    assert sum(summary.counts[kind] for kind in ('bad', 'left_out', 'too_long', 'without_target')) + len(used) >= len(
        rows
    )
    assert used, 'the undamaged record at the end is always used'
    for conversation, sample in used:
        trained = ''.join(internlm_like.decode(i) for i in sample.labels if i >= 0)
        written = [m.content for m in conversation.messages if m.role in MODEL_ROLES and m.loss is not False]
        assert written
        assert trained
        questions = [m.role for m in conversation.messages]
        assert not any(a == b == 'user' for a, b in pairwise(questions)), 'a shifted turn'
    for message in summary.examples.get('bad', []):
        assert re.match(rf'{re.escape(str(file))}:\d+: \S', message), message
        assert '\n' not in message
    if summary.counts['bad']:
        with pytest.raises(DataError, match=r'data\.jsonl:\d+: .*on_bad_record'):
            list(encode_source(source, replace(config, on_bad_record='error'), encoder=encoder, summary=Summary()))


def test_every_format_is_damaged():
    assert {name for name, _ in SEEDS} == set(formats())
    assert all(callable(resolve_map_fn(name)) for name in formats())
