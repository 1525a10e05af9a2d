from __future__ import annotations

import importlib
import json
import logging
import sys

import numpy as np
import pytest
import torch

import xtuner.dataset.mapping.map_records as mapping
import xtuner.dataset.prepare as pipeline
from tests.dataset.conftest import RECORDS
from xtuner.dataset.cache.store import PreparedDataset
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import Encoder, encode_conversation
from xtuner.dataset.packing.pack import PACKINGS
from xtuner.dataset.prepare import prepared_folder
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ConfigError, DataError


@pytest.fixture
def log(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger('xtuner'), 'propagate', True)  # a command run before may have set it
    caplog.set_level(logging.INFO, 'xtuner')
    return caplog


def targets(dataset) -> int:
    return sum(int((dataset[i]['labels'] != -100).sum()) for i in range(len(dataset)))


@pytest.mark.parametrize('packing', PACKINGS)
def test_every_token_of_every_conversation_is_there_once(prepare, packing):
    dataset = prepare(packing=packing)
    seen = {}
    for i in range(len(dataset)):
        item = dataset[i]
        assert all(tensor.dtype == torch.int64 for tensor in item.values())
        assert dataset.lengths[i] == len(item['input_ids']) <= 128
        starts = np.flatnonzero(item['position_ids'] == 0)
        for start, end in zip(starts, [*starts[1:], len(item['input_ids'])], strict=True):
            assert item['position_ids'][start:end].tolist() == list(range(end - start))
            assert item['labels'][start] == -100
            seen[tuple(item['input_ids'][start:end].tolist())] = item['labels'][start:end].tolist()
    assert len(seen) == 60
    for record in RECORDS:
        turn = {'input': record['question'], 'output': record['answer']}
        sample = encode_conversation(to_conversation({'conversation': [turn]}), prepare.tokenizer, prepare.template)
        assert seen[tuple(sample.input_ids.tolist())] == sample.labels.tolist()
    assert targets(dataset) == dataset.summary.target_tokens
    assert dataset.summary.tokens == dataset.lengths.sum()


def test_one_conversation_trains(prepare, log):
    dataset = prepare(RECORDS[:1])
    assert len(dataset) == 1 and targets(dataset) > 0
    assert f'1 pack, {dataset.lengths[0] / 128:.1%} full' in log.text  # of what a pack may have
    with pytest.raises(IndexError):
        dataset[1]


def test_a_second_start_maps_nothing(prepare, monkeypatch, log):
    first = prepare()
    monkeypatch.setattr(mapping, 'apply_map_fn', lambda *args: pytest.fail('mapped again'))
    second = prepare()
    assert second.folder == first.folder
    assert 'data: loaded from' in log.text
    with pytest.raises(pytest.fail.Exception):
        prepare(max_length=96)


def test_the_cache_follows_everything_that_changes_the_tokens(prepare, tokenizer):
    folders = [prepare().folder]
    def_fn = lambda example: {'conversation': [{'input': 'q', 'output': example['answer']}]}  # noqa: E731
    for options in ({'max_length': 64}, {'packing': 'none'}, {'train_on': 'all'}, {'map_fn': 'gsm8k'},
                    {'map_fn': def_fn}, {'val_ratio': 0.1}, {'on_long': 'drop'}, {'ignore': ['id']}):  # fmt: skip
        folders.append(prepare(**options).folder)
    folders.append(prepare(RECORDS[1:]).folder)
    other = get_template('default', prepare.tokenizer)
    folders.append(prepared_folder(prepare.config, tokenizer=prepare.tokenizer, template=other))
    folders.append(prepared_folder(prepare.config, tokenizer=tokenizer, template=prepare.template))
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize('where', ['my_map_fn.py', 'my_helper.py'])
def test_a_map_function_that_changes_is_called_again(prepare, monkeypatch, where):
    """Also where only what another module of the user's says has changed."""
    monkeypatch.syspath_prepend(str(prepare.folder))
    answers = []
    for helper in ('text', 'text.upper()'):  # the function itself stays as it is
        (prepare.folder / 'my_helper.py').write_text('')
        importing = '' if where == 'my_map_fn.py' else 'from my_helper import helper\n'
        (prepare.folder / 'my_map_fn.py').write_text(
            f"{importing}def fn(example):\n    return {{'conversation': [{{'input': 'q', 'output': helper('a')}}]}}\n"
        )
        with (prepare.folder / where).open('a') as file:
            file.write(f'def helper(text):\n    return {helper}\n')
        for module in ('my_map_fn', 'my_helper'):
            monkeypatch.delitem(sys.modules, module, raising=False)
        importlib.invalidate_caches()
        answers.append(prepare.tokenizer.decode(prepare(RECORDS[:1], map_fn='my_map_fn:fn')[0]['input_ids']))
    assert 'A<eoa>' in answers[1].replace(' ', '') and answers[0] != answers[1]


BAD = [b'{"question": "q", "answer": ', b'{"question": "\xff", "answer": "a"}', b'{"question": "q"}', b'[1]',
       b'{"question": "q", "answer": ""}', b'{"question": "q", "answer": null}']  # fmt: skip


@pytest.mark.parametrize('line', BAD)
def test_a_bad_record_is_an_error_with_file_and_line_or_a_counted_skip(prepare, line, log):
    records = [*RECORDS[:30], line, *RECORDS[30:]]
    with pytest.raises(DataError, match=r"data\.jsonl:31: .*on_bad_record='skip'"):
        prepare(records)
    dataset = prepare(records, on_bad_record='skip')
    assert dataset.summary.counts['bad'] == 1 and dataset.summary.kept == 60
    assert 'data.jsonl:31' in dataset.summary.examples['bad'][0]
    assert '1 could not be used: ' in log.text


def test_unused_and_ignored_fields_are_reported_also_from_the_cache(prepare, log):
    records = [{**record, 'id': n, 'score': 0.5} for n, record in enumerate(RECORDS)]
    for said in ('prepared in', 'loaded from'):
        log.clear()
        assert prepare(records).summary.unused == {'id': 60, 'score': 60}
        assert f'data: {said}' in log.text and '`score` is not used (60 records)' in log.text
    records[40]['system'] = 'Be brief.'
    used = prepare(records)
    assert '`system`' not in used.summary.report()
    ignored = prepare(records, ignore=['system', 'score'])
    assert '`system` (system text) is ignored by dataset.ignore (1 record)' in ignored.summary.report()
    assert used.digest != ignored.digest == prepare(RECORDS).digest
    records[40]['chat_history'] = [['a', 'b']]
    with pytest.raises(
        DataError, match=r'data\.jsonl:41: `chat_history` \(earlier turns\) is not read by `gsm8k_map_fn`'
    ):
        prepare(records)
    dataset = prepare(records, on_bad_record='skip')
    assert (dataset.summary.counts['bad'], dataset.summary.kept) == (1, 59)


def test_losing_too_much_is_an_error(prepare):
    with pytest.raises(DataError, match=r'3 of 10 conversations would be dropped, and `dataset.max_dropped` is 0.2; '):
        prepare([*RECORDS[:7], b'a', b'b', b'c'], on_bad_record='skip')
    assert len(prepare([*RECORDS[:7], b'a', b'b', b'c'], on_bad_record='skip', max_dropped=0.5)) > 0
    with pytest.raises(DataError, match='contains no conversation'):
        prepare([])


def test_an_id_that_comes_twice_is_a_bad_record(prepare):
    records = [{**RECORDS[0], 'id': 1}, {**RECORDS[1], 'id': '1'}, RECORDS[2], RECORDS[3], {**RECORDS[4], 'id': 1}]
    with pytest.raises(DataError, match=r"data\.jsonl:5: `id` '1' occurred before"):
        prepare(records)
    assert prepare(records, unique_id=None).summary.kept == 5


@pytest.mark.parametrize(('on_long', 'kept', 'kind'), [('drop', 59, 'too_long'), ('truncate', 60, 'cut'),
                                                       ('truncate_left', 60, 'cut')])  # fmt: skip
def test_long_conversations_are_counted_with_their_lines(prepare, on_long, kept, kind):
    records = [*RECORDS, {'question': 'Hi', 'answer': 'long ' * 200}][1:]
    dataset = prepare(records, on_long=on_long)
    assert dataset.summary.kept == kept and dataset.summary.counts[kind] == 1
    [example] = dataset.summary.examples[kind]
    assert example.startswith(f'{prepare.folder}/data.jsonl:60 (10')
    eoa = prepare.tokenizer.convert_tokens_to_ids('<eoa>')
    ends = sum(int((dataset[i]['labels'] == eoa).sum()) for i in range(len(dataset)))
    assert ends == (59 if on_long != 'truncate_left' else 60)


def test_a_long_question_leaves_nothing_to_train_and_is_dropped(prepare):
    records = [*RECORDS, {'question': 'long ' * 200, 'answer': 'a'}]
    assert prepare(records).summary.counts['without_target'] == 1
    with pytest.raises(DataError, match=r'data\.jsonl:61: the conversation has \d+ tokens'):
        prepare(records, on_long='error')


def test_a_validation_file_is_prepared_like_the_training_file(prepare, log):
    (prepare.folder / 'val.jsonl').write_text(json.dumps(RECORDS[0]))
    options = {'val_file': str(prepare.folder / 'val.jsonl')}
    assert prepare(**options).summary.kept == 60
    assert prepare(part='val', **options).summary.kept == 1
    assert log.text.count('1 of 1 conversations of `dataset.val_file` are also in the training data') == 1
    (prepare.folder / 'val.jsonl').write_text(json.dumps({'question': 'new', 'answer': 'new'}))
    log.clear()
    assert prepare(part='val', **options).summary.kept == 1
    assert 'training data, so' not in log.text
    with pytest.raises(ConfigError, match=r'`dataset.val_file` and `dataset.val_ratio` are both set'):
        prepare(val_ratio=0.1, **options)
    with pytest.raises(DataError, match='leaves none to train'):
        prepare(val_ratio=0.999)


def test_grouping_by_length_is_for_data_that_is_not_packed(prepare):
    assert len(prepare(packing='none', group_by_length=True)) == 60
    with pytest.raises(
        ConfigError, match=r"`dataset.group_by_length` needs `dataset.packing = 'none'`, got 'best_fit'"
    ):
        prepare(group_by_length=True)


@pytest.mark.real
@pytest.mark.parametrize(
    'name',
    [pytest.param('gsm8k_train.jsonl', marks=pytest.mark.slow), 'gsm8k_test.jsonl', 'oasst_en_100_trees.jsonl'],
)
def test_no_target_token_of_the_real_data_is_lost(prepare, shared_data, name):
    found = {}
    for packing in PACKINGS:
        dataset = prepare(None, source=str(shared_data / name), packing=packing, max_length=16384)
        found[packing] = targets(dataset)
        assert found[packing] == dataset.summary.target_tokens
        assert not dataset.summary.counts
    assert len(set(found.values())) == 1


def test_a_start_from_the_cache_looks_at_no_sample(prepare, monkeypatch, log):
    """Conversations that the training data has too are counted from hashes kept at preparation."""
    lines = '\n'.join(map(json.dumps, [*RECORDS[:2], {'question': 'new', 'answer': 'new'}]))
    (prepare.folder / 'val.jsonl').write_text(lines)
    for _ in range(2):
        prepare(val_file=str(prepare.folder / 'val.jsonl'))
        prepare(val_file=str(prepare.folder / 'val.jsonl'), part='val')
        assert 'warning: 2 of 3 conversations of `dataset.val_file` are also in the training data' in log.text
        log.clear()
        monkeypatch.setattr(PreparedDataset, 'sample', lambda *_: pytest.fail('a sample was read'))
    monkeypatch.setattr(pipeline, 'is_first_process', lambda: False)
    monkeypatch.setattr(np, 'isin', lambda *_: pytest.fail('compared on another rank'))
    prepare(val_file=str(prepare.folder / 'val.jsonl'), part='val')


def test_where_training_data_is_not_prepared_as_a_whole_that_is_said(prepare, log):
    (prepare.folder / 'val.jsonl').write_text(json.dumps({'question': 'new', 'answer': 'new'}))
    prepare(val_file=str(prepare.folder / 'val.jsonl'), part='val')
    assert '`dataset.val_file` is not compared with the training data' in log.text


def test_losses_are_counted_alike_in_every_run(prepare, monkeypatch, tmp_path):
    """Records that the map function refuses and conversations that cannot be encoded are found by two threads."""
    monkeypatch.setattr(pipeline, '_CHUNK_CONVERSATIONS', 7)
    encode = Encoder.encode

    def refusing(self, conversations):
        for conversation in conversations:
            if 'I am 4' in conversation.messages[-1].content:
                raise DataError(f'{conversation.origin}: refused')
        return encode(self, conversations)

    monkeypatch.setattr(Encoder, 'encode', refusing)
    records = [
        line for n, record in enumerate(RECORDS * 3) for line in ([record, {'question': n}] if n % 5 else [record])
    ]
    found = []
    for number in range(6):
        options = {'on_bad_record': 'skip', 'max_dropped': 0.9, 'cache_dir': str(tmp_path / f'cache{number}')}
        summary = prepare(records, **options).summary
        assert summary.kept + summary.counts['bad'] == summary.records == len(records)
        found.append((summary.counts, summary.examples))
    assert found == found[:1] * 6
