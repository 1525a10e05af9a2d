"""A field of a record is used, is an error, or is a note: never silent, whatever its name, its type and its place."""

from __future__ import annotations

import copy
import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.dataset.map_fns.test_registration import RECORDS, TURN
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.encode.conversation_encoder import Encoder
from xtuner.dataset.map_fns import formats
from xtuner.dataset.mapping.unread_fields import _KINDS, Observed, is_empty, kind_of, training_flag
from xtuner.dataset.prepare import encode_source
from xtuner.dataset.sources.readers import Record
from xtuner.dataset.sources.source import Source
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ConfigError, DataError

NAMES = sorted(
    {*_KINDS, 'system_prompt', 'chat_history', 'toolCalls', 'tool-calls', 'function_call', 'Reasoning_Content',
     'images', 'reasoning_content', 'image_url', 'audio', 'video_path', 'output_with_loss', 'need_loss', 'train_on',
     'loss_mask', 'is_masked', 'need_eos_token', 'image_id', 'videoIds'}
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
        assert may_be_a_note(field, value), 'silent'
        assert summary.unused == {field: 1}
    elif after == before:  # in a message: a flag that says what is done anyway is used
        noted = any(key.endswith(f'.{field}') for key in summary.unused)
        flag = _flag_says(field, value)
        own_metadata = not kind_of(field) and name.startswith(('oasst_tree', 'moss', 'msagent'))
        assert noted or flag is not None or (field, value) == ('need_eos_token', True) or own_metadata, 'silent'


# As text, these columns label a record.
LABELS = ('developer', 'tool', 'turns', 'image_id', 'videoIds')
FLAGS = (True, False, 0, 1, 'true', 'False', '0', [True, False])


def may_be_a_note(field: str, value: object) -> bool:
    """Whether a column that nothing reads changes nothing of what is learnt."""
    kind = kind_of(field)
    if kind == 'training flag':  # one that says that the record is trained, and what is no flag at all
        return value not in FLAGS or _flag_says(field, value) is True
    if isinstance(value, (bool, int, float)) or not kind:
        return True
    if field.lower().endswith(('id', 'ids')):
        return True
    return isinstance(value, str) and (
        field in LABELS or (kind == 'reasoning' and value in ('False', 'true', '0', 'no'))
    )


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
        (
            {'weight': 0.5},
            r'`messages\[1\].weight` must be true, false, 0 or 1, got 0.5; a message is trained as a whole',
        ),
        ({'weight': math.nan}, 'got nan'),
        ({'loss': 'maybe'}, "got 'maybe'"),
        (
            {'loss': True, 'weight': 0},
            r'`messages\[1\]` has contradicting training flags: loss, weight',
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

    assert 'memory[0]: `messages[1].thinking` (reasoning) is not supported' in learn(mine, {'t': 'because'})[1]
    assert learn(mine, {'t': ''})[1] == ''


def test_a_key_that_ones_own_map_function_misses_is_named_with_the_record(learn):
    _, error, _ = learn(lambda example: {'conversation': [{'input': example['toy'], 'output': 'a'}]}, {'b': 1, 'a': 2})
    expected = (
        "memory[0]: `<lambda>` reads 'toy', which this record lacks; it has a, b; read optional columns "
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
    with pytest.raises(DataError, match=r'memory\[0\]: template `from_tokenizer` does not support `tools`'):
        list(encode_source(source, config, encoder=Encoder(tokenizer, template), summary=Summary()))


QA = {'instruction': 'q', 'output': 'a'}
OTHER_TURN = [TURN[0], {'from': 'gpt', 'value': 'b'}]


@pytest.mark.parametrize(
    ('field', 'value'),
    [
        ('loss', 1.23), ('train', 'train'), ('weight', 0.5), ('video_id', 'dQw4'), ('image_ids', ['a']),
        ('reasoning', 'on'), ('thinking', True), ('turns', '2'), ('developer', 'OpenAI'), ('tool', 'chatgpt'),
        ('loss', True), ('is_masked', 'False'), ('loss_mask', {'x': 'y'}), ('messages', []),
        ('messages', [ASK, CALL]), ('conversations', TURN),
    ],
)  # fmt: skip
def test_a_column_whose_value_shows_that_it_changes_nothing_is_a_note(field, value, learn):
    samples, error, summary = learn('alpaca', {**QA, field: value})
    assert not error and samples == learn('alpaca', QA)[0]
    assert summary.unused == ({field: 1} if value else {})


@pytest.mark.parametrize(
    ('field', 'value', 'text'),
    [
        ('loss', 0, r'`loss` is 0 \(training flag\), but `alpaca_map_fn` .* write `loss`: false into each message'),
        ('is_masked', 'True', "`is_masked` is 'True' "),
        ('loss_mask', [0, 1], r'`loss_mask` is \[0, 1\] '),
        ('reasoning', 'on 2 + 2', 'reasoning'), ('rationale', 'so', 'reasoning'),
        ('tool', [{'name': 'f'}], 'tools'), ('tool', '[{"name": "f"}]', 'tools'), ('tool_calls', 'f()', 'tools'),
        ('developer', ['Be brief.'], 'system text'), ('sys_prompt', 'on', 'system text'),
        ('turns', [['q', 'a']], 'earlier turns'), ('image', 'a.png', 'image'), ('video_path', 'a', 'image'),
        ('messages', [ASK, {**CALL, 'content': 'b'}], 'earlier turns'),
        ('messages', [ASK, {**CALL, 'reasoning_content': 'so'}], 'earlier turns'),
        ('messages', [ASK, {**CALL, 'loss': False}], 'earlier turns'),
        ('messages', [{'role': 'system', 'content': 's'}, ASK, CALL], 'earlier turns'),
    ],
)  # fmt: skip
def test_a_column_that_changes_what_is_learnt_stays_an_error(field, value, text, learn):
    _, error, _ = learn('alpaca', {**QA, field: value})
    assert re.search(text, error) and f"dataset.ignore=['{field}']" in error, error


@pytest.mark.parametrize('name', ['openai', 'sharegpt', None])
def test_messages_beside_conversations(name, learn):
    used, other = ('conversations', 'messages') if name == 'sharegpt' else ('messages', 'conversations')
    record = {'messages': [ASK, CALL], 'conversations': TURN}
    samples, error, summary = learn(name, record)
    assert not error and summary.unused == {other: 1}
    for empty in ([], '', None):
        assert learn(None, {**record, 'messages': empty})[:2] == (samples, '')
        assert learn(None, {**record, 'conversations': empty})[:2] == (samples, '')
    _, error, _ = learn(name, {**record, 'conversations': OTHER_TURN})
    assert f'which uses the different `{used}`' in error and f'to use {other} instead, set' in error


def test_a_field_that_a_template_has_no_place_for_says_what_to_do(learn):
    def of(**fields):
        return learn('openai', {'messages': [ASK, {**CALL, **fields}]})[1]

    assert "set model.template='from_tokenizer' if the tokenizer's chat template reads it" in of(reasoning='so')
    assert 'write `loss` as true or false into each message' in of(mask=[1])
    assert 'only text is trained: remove such records' in of(image='a.png')
    assert "if it is not a training flag, ignore it with dataset.ignore=['loss']" in of(loss=1.23)


HUMAN, GPT = {'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}
PUBLISHED = {
    'OpenHermes-2.5': ({
        'conversations': [HUMAN, GPT], 'source': 'glaive', 'category': 'coding', 'skip_prompt_formatting': False,
        'system_prompt': None, 'model': 'gpt-4', 'title': 't', 'topic': 'x', 'id': '1', 'hash': 123, 'idx': '4',
        'language': 'en', 'views': 7.0, 'custom_instruction': False, 'avatarUrl': 'https://x/y.png',
        'model_name': 'gpt-4'}, 'sharegpt'),
    'UltraChat': ({'prompt': 'q', 'prompt_id': 'f0', 'messages': [ASK, CALL]}, 'openai'),
    'no_robots': ({'prompt': 'q', 'prompt_id': 'f0', 'messages': [ASK, CALL], 'category': 'Chat'}, 'openai'),
    'Dolly': ({'instruction': 'q', 'context': '', 'response': 'a', 'category': 'open_qa'}, 'instruction_response'),
    'WizardLM evol': ({'instruction': 'q', 'output': 'a'}, 'alpaca'),
    'SlimOrca': ({'conversations': [{**HUMAN, 'weight': 0.0}, {**GPT, 'weight': 1.0}]}, 'sharegpt'),
    'Alpaca-GPT4': ({'instruction': 'q', 'input': '', 'output': 'a', 'text': '### Instruction:\nq'}, 'alpaca'),
    'CodeAlpaca': ({'prompt': 'q', 'completion': 'a'}, 'prompt_completion'),
    'OASST guanaco': ({'text': '### Human: q### Assistant: a'}, 'oasst1'),
    'OASST trees': ({**RECORDS['oasst_tree'], 'message_tree_id': 't', 'tree_state': 'ready_for_export'}, 'oasst_tree'),
    'LIMA': ({'conversations': ['q', 'a'], 'source': 'stackexchange'},
             "`conversations[0]` must be a dict with `from` and `value`, got 'q'; plain texts do not say who speaks"),
    'MetaMath': ({'query': 'q', 'response': 'a', 'type': 'GSM_Rephrased', 'original_question': 'q'},
                 'no known format has the columns original_question, query, response, type; the nearest is '),
}  # fmt: skip


@pytest.mark.parametrize('title', PUBLISHED)
def test_columns_of_published_data_sets(title, learn):
    """Each is read as question and answer, with a note for each other column, or is an error that says what to do."""
    record, expected = PUBLISHED[title]
    plain = learn('default', {'input': 'q', 'output': 'a'})[0]
    if expected not in formats():
        try:
            error = learn(None, record)[1]
        except ConfigError as caught:
            error = str(caught)
        assert expected in error and 'your own map function' in error
        return
    samples, error, summary = learn(None, record)
    assert (samples, error) == (plain, '')
    assert summary.formats == {'memory': f'detected as {expected}'}
    read = {'conversations', 'messages', 'text', *formats()[expected].columns} - (
        {'text'} if 'input' in record else set()
    )
    assert set(summary.unused) == {key for key, value in record.items() if not is_empty(value)} - read - {'context'}


def test_the_system_prompt_of_openhermes_is_used(learn):
    record = {**PUBLISHED['OpenHermes-2.5'][0], 'system_prompt': 'Be brief.'}
    samples, error, summary = learn(None, record)
    assert not error and 'system_prompt' not in summary.unused
    assert samples == learn('default', {'input': 'q', 'output': 'a', 'system': 'Be brief.'})[0]
