"""A field of a record is used, is an error, or is a note: never silent, whatever its name, its type and its place."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataset.test_map_fns import RECORDS
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.fields import _KINDS, Observed, is_empty, kind_of, training_flag
from xtuner.dataset.map_fns import formats
from xtuner.dataset.pipeline import encode_source
from xtuner.dataset.readers import Record
from xtuner.dataset.sources import Source
from xtuner.dataset.summary import Summary
from xtuner.dataset.template import get_template
from xtuner.dataset.tokenize import Encoder
from xtuner.errors import DataError

NAMES = sorted(
    {*_KINDS, 'system_prompt', 'chat_history', 'toolCalls', 'tool-calls', 'function_call', 'Reasoning_Content',
     'images', 'reasoning_content', 'image_url', 'audio', 'video_path', 'output_with_loss', 'need_loss', 'train_on',
     'loss_mask', 'is_masked', 'need_eos_token'}
)  # fmt: skip
OTHERS = ['id', 'source', 'score', 'category', 'lang', 'url', 'name', 'markdown']
VALUES = st.sampled_from(
    [True, False, 0, 1, 0.0, 1.0, 0.5, -1, math.nan, 'False', 'true', '0', 'no', 'text', 'a.png', ['text'], {'x': 'y'},
     [['q', 'a']], [True, False], [{'role': 'user', 'content': 'x'}], [{'type': 'function'}]]
)  # fmt: skip
EMPTY = st.sampled_from([None, '', [], {}, [None], {'x': None}])


@pytest.fixture(scope='module')
def learn(internlm_like_module):
    """What becomes of one record under a format: (ids, labels) of each conversation, an error, and what is reported."""

    def run(name, record, **options):
        config = DatasetConfig(source='x', map_fn=name, max_length=4096, unique_id=None, **options)
        source = Source('memory', lambda: iter([Record('memory[0]', record)]), lambda: '')
        template = get_template('moss_sft' if name == 'moss_003_sft' else 'internlm_chat')
        summary, encoder = Summary(), Encoder(internlm_like_module, template)
        try:
            chunks = list(encode_source(source, config, encoder=encoder, summary=summary))
        except DataError as error:
            return None, str(error), summary
        samples = [(s.input_ids.tolist(), s.labels.tolist()) for chunk in chunks for _, s in chunk]
        return samples, '', summary

    return run


@pytest.fixture(scope='module')
def internlm_like_module():
    from tests.dataset.conftest import make_tokenizer

    return make_tokenizer(['<eoh>', '<eoa>'])


def places(record: dict) -> list[dict]:
    """The record, and every dict in it that stands for a message or a turn."""
    found, todo = [record], list(record.items())
    while todo:
        key, value = todo.pop()
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if key != 'tools':
            found += [value] if isinstance(value, dict) else []
            todo += [(key, item) for item in items]
    return found


def put(record, place: int, name: str, value: object):
    changed = copy.deepcopy(record)
    target = places(changed)[place]
    if name in target:
        return None
    target[name] = value
    return changed


@pytest.mark.parametrize('name', sorted(formats()))
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_a_field_that_is_put_into_a_record_is_used_refused_or_noted(name, data, learn):
    record = RECORDS[name]
    if name == 'openai':
        record = {'messages': record['messages']}
    place = data.draw(st.integers(0, len(places(record)) - 1))
    field, value = data.draw(st.sampled_from([*NAMES, *OTHERS])), data.draw(VALUES)
    changed = put(record, place, field, value)
    if changed is None:
        return
    before, _, _ = learn(name, record)
    after, error, summary = learn(name, changed)
    if error:
        assert error.startswith('memory[0]: ') and '\n' not in error, error
    elif after == before and place == 0:
        says_it_is_trained = kind_of(field) == 'training flag' and summary.unused
        assert says_it_is_trained or not kind_of(field) or isinstance(value, (bool, int, float)), 'silent'
        assert summary.unused == {field: 1}
    elif after == before:  # in a message: a flag that says what is done anyway is used
        noted = any(key.endswith(f'.{field}') for key in summary.unused)
        flag = _flag_says(field, value)
        own_metadata = not kind_of(field) and name.startswith(('oasst_tree', 'moss', 'msagent'))
        assert noted or flag is not None or (field, value) == ('need_eos_token', True) or own_metadata, 'silent'


def _flag_says(field: str, value: object) -> bool | None:
    try:
        return training_flag({field: value}, '', '')[0]
    except DataError:
        return None


@pytest.mark.parametrize('name', sorted(formats()))
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_a_field_without_content_is_no_field(name, data, learn):
    place = data.draw(st.integers(0, len(places(RECORDS[name])) - 1))
    changed = put(RECORDS[name], place, data.draw(st.sampled_from([*NAMES, *OTHERS])), data.draw(EMPTY))
    if name == 'openai':  # its tools are an error of the template whatever else there is
        changed = changed and {'messages': changed['messages']}
    if changed is not None:
        record = {'messages': RECORDS[name]['messages']} if name == 'openai' else RECORDS[name]
        samples, error, summary = learn(name, changed)
        assert (samples, error, summary.unused) == (*learn(name, record)[:2], {})


@pytest.mark.parametrize('name', sorted(formats()))
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_what_is_ignored_is_as_if_it_were_not_there(name, data, learn):
    record = {'messages': RECORDS[name]['messages']} if name == 'openai' else RECORDS[name]
    place = data.draw(st.integers(0, len(places(record)) - 1))
    field, value = data.draw(st.sampled_from([*NAMES, *OTHERS])), data.draw(VALUES)
    changed = put(record, place, field, value)
    if changed is None or any(field in place for place in places(record)):
        return
    samples, error, summary = learn(name, changed, ignore=[field])
    assert not error
    assert samples == learn(name, record)[0]
    assert summary.ignored == {field: 1}


CALL = {'role': 'assistant', 'content': 'a'}
ASK = {'role': 'user', 'content': 'q'}


@pytest.mark.parametrize('value', [False, 0, 0.0, 'False', 'false', '0'])
@pytest.mark.parametrize('field', ['loss', 'weight', 'train', 'Need_Loss', 'trainable', 'output_with_loss'])
def test_a_flag_in_any_spelling_and_type_leaves_an_answer_untrained(field, value):
    later = [ASK, {**CALL, field: value}, ASK, CALL]
    assert [m.loss for m in to_conversation({'messages': later}).messages] == [None, False, None, None]
    turns = [{'input': 'q', 'output': 'a', field: value}]
    assert to_conversation({'conversation': turns}).messages[1].loss is False
    assert to_conversation({'messages': [ASK, {**CALL, 'is_masked': 'True'}]}).messages[1].loss is False


@pytest.mark.parametrize(
    ('fields', 'text'),
    [
        ({'weight': 0.5}, r'`messages\[1\].weight` must be true, false, 0 or 1, got 0.5; a message is trained whole'),
        ({'weight': math.nan}, 'got nan'),
        ({'loss': 'maybe'}, "got 'maybe'"),
        (
            {'loss': True, 'weight': 0},
            r'`messages\[1\]` is trained by one and not by another of its fields loss, weight',
        ),
    ],
)
def test_a_flag_that_says_neither_is_an_error(fields, text):
    with pytest.raises(DataError, match=text):
        to_conversation({'messages': [ASK, {**CALL, **fields}]})


@pytest.mark.parametrize('name', ['system', 'sys_prompt', 'systemMessage'])
def test_a_columns_of_ones_own_map_function_are_notes(name, learn):
    def mine(example):
        return {'conversation': [{'input': example['a'], 'output': example.get('b')}]}

    samples, error, summary = learn(mine, {'a': 'q', 'b': 'a', name: 'Be brief.', 'id': 3, 'empty': None})
    assert samples and not error and summary.unused == {name: 1, 'id': 1}
    assert f'`{name}` (system text) is not used (1 record)' in summary.report()
    assert learn(lambda example: mine({**example}), {'a': 'q', 'b': 'a', name: 'x'})[2].unused == {}


def test_ones_own_map_function_may_return_a_field_that_the_template_has_no_place_for(learn):
    def mine(example):
        return {'messages': [ASK, {**CALL, 'thinking': example['t']}]}

    assert 'memory[0]: `messages[1].thinking` (reasoning) has no place' in learn(mine, {'t': 'because'})[1]
    assert learn(mine, {'t': ''})[1] == ''


def test_a_key_that_ones_own_map_function_misses_is_named_with_the_record(learn):
    _, error, _ = learn(lambda example: {'conversation': [{'input': example['toy'], 'output': 'a'}]}, {'b': 1, 'a': 2})
    expected = (
        "memory[0]: `<lambda>` reads 'toy', which this record does not have; it has a, b; read what may be missing "
        "with `.get('toy')`"
    )
    assert error.startswith(expected)


@pytest.mark.parametrize(
    ('walk', 'read'),
    [
        (lambda record: record['a'], {'a'}),
        (lambda record: 'b' in record and record.get('a'), {'a'}),
        (lambda record: {**record}, {'a', 'b'}),
        (lambda record: dict(record), {'a', 'b'}),
        (lambda record: record | {'c': 1}, {'a', 'b'}),
        (lambda record: json.dumps(record), {'a', 'b'}),
        (lambda record: list(record.values()), {'a', 'b'}),
        (lambda record: list(record.items()), {'a', 'b'}),
        (lambda record: record.copy(), {'a', 'b'}),
        (lambda record: record.pop('b'), {'b'}),
        (lambda record: [record[key] for key in record], {'a', 'b'}),
    ],
)
def test_what_is_read_of_a_record_is_seen(walk, read):
    record = Observed({'a': 1, 'b': 2})
    plain = walk({'a': 1, 'b': 2})
    assert walk(record) == plain and record.read == read


def test_emptiness():
    assert all(map(is_empty, [None, '', [], {}, (), [None, ''], {'a': None, 'b': [{}]}]))
    assert not any(map(is_empty, [0, False, 0.0, ' ', [0], {'a': False}]))


def test_many_names_are_counted_together(learn):
    summary = Summary()
    for number in range(1000):
        summary.add_unused([f'field {number}\x1b[2J\n'])
    assert len(summary.report()) == 52
    assert not any('\x1b' in line or '\n' in line for line in summary.report())
    assert '`(further fields)` is not used (950 records)' in summary.report()


REASONING = """{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize('field', ['reasoning_content', 'thinking', 'reasoning', 'thought'])
def test_reasoning_goes_to_a_chat_template_that_renders_it(field):
    from tests.dataset.conftest import make_tokenizer

    tokenizer = make_tokenizer(['<|im_start|>', '<|im_end|>'])
    tokenizer.chat_template = REASONING
    template = get_template('from_tokenizer', tokenizer)
    record = {'messages': [ASK, {**CALL, field: 'because', 'name': 'x'}]}
    source = Source('memory', lambda: iter([Record('memory[0]', record)]), lambda: '')
    summary, config = Summary(), DatasetConfig(source='x')
    [[(_, sample)]] = list(encode_source(source, config, encoder=Encoder(tokenizer, template), summary=summary))
    assert '<think>because</think>a<|im_end|>' in tokenizer.decode([i for i in sample.labels if i >= 0])
    assert summary.unused == {'messages[].name': 1}
    source = Source('memory', lambda: iter([Record('memory[0]', {**record, 'tools': [{'name': 'f'}]})]), lambda: '')
    with pytest.raises(DataError, match=r'memory\[0\]: template `from_tokenizer` has no place for `tools`'):
        list(encode_source(source, config, encoder=Encoder(tokenizer, template), summary=Summary()))
