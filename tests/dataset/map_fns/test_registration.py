from __future__ import annotations

import json
import pkgutil

import pytest

import xtuner.dataset.map_fns as map_fns
from xtuner.dataset.map_fns import detect_map_fn, formats, resolve_map_fn
from xtuner.dataset.mapping.map_records import apply_map_fn
from xtuner.dataset.sources.readers import Record
from xtuner.errors import ConfigError, DataError

pytestmark = pytest.mark.unit

ISSUE_NAMES = {
    'alpaca', 'alpaca_zh', 'code_alpaca', 'oasst1', 'openai', 'sharegpt', 'arxiv', 'colors', 'crime_kg_assitant',
    'law_reference', 'medical', 'msagent_react', 'openorca', 'pretrain', 'sql', 'stack_exchange', 'tiny_codes',
    'wizardlm', 'default',
}  # fmt: skip
TURN = [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]
RECORDS = {
    'conversation': {'conversation': [{'system': 's', 'input': 'q', 'output': 'a'}]},
    'alpaca': {'instruction': 'i', 'input': 'x', 'output': 'o'},
    'alpaca_zh': {'instruction_zh': 'i', 'input_zh': '', 'output_zh': 'o'},
    'code_alpaca': {'prompt': 'p', 'completion': 'c'},
    'arxiv': {'abstract': 'a', 'title': 't'},
    'colors': {'description': 'red', 'color': '#f00'},
    'crime_kg_assitant': {'input': 'q', 'output': 'a'},
    'law_reference': {'question': 'q', 'reference': ['r1', 'r2'], 'answer': 'a'},
    'medical': {'instruction': 'i', 'input': '', 'output': 'o'},
    'openorca': {'system_prompt': 's', 'question': 'q', 'response': 'r'},
    'sql': {'context': 'CREATE', 'question': 'q', 'answer': 'SELECT'},
    'stack_exchange': {'question': 'q', 'response': 'r'},
    'tiny_codes': {'prompt': 'p', 'response': 'r'},
    'default': {'input': 'i', 'output': 'o'},
    'gsm8k': {'question': 'q', 'answer': 'a'},
    'prompt_completion': {'prompt': 'p', 'completion': 'c'},
    'prompt_response': {'prompt': 'p', 'response': 'r'},
    'instruction_response': {'instruction': 'i', 'context': 'c', 'response': 'r'},
    'context_question_answer': {'context': 'c', 'question': 'q', 'answer': 'a'},
    'pretrain': {'text': 'a document'},
    'openai': {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}],
               'tools': [{'n': 1}]},
    'sharegpt': {'system': 's', 'conversations': TURN},
    'wizardlm': {'conversations': TURN},
    'oasst1': {'text': '### Human: q### Assistant: a'},
    'oasst_tree': {'prompt': {'role': 'prompter', 'text': 'q', 'replies': [{'role': 'assistant', 'text': 'a'}]}},
    'oasst_tree_all': {'prompt': {'role': 'prompter', 'text': 'q', 'replies': [{'role': 'assistant', 'text': 'a'}]}},
    'moss_003_sft': {'chat': {'turn_1': {'Human': '<|Human|>: q<eoh>\n', 'MOSS': '<|MOSS|>: a<eom>\n'}}},
    'msagent_react': {'conversations': [{'from': 'user', 'value': 'q'}, {'from': 'assistant', 'value': 'a'}]},
}  # fmt: skip


def texts(name, record, origin='file:1'):
    conversations = apply_map_fn(resolve_map_fn(name), Record(origin, record))
    return [[(m.role, m.content) for m in conversation.messages] for conversation in conversations]


def test_every_usual_name_is_there_under_both_names_and_by_import():
    assert not ISSUE_NAMES - set(formats())
    for name in formats():
        assert resolve_map_fn(name) is resolve_map_fn(f'{name}_map_fn') is getattr(map_fns, f'{name}_map_fn')


def test_one_file_a_format():
    modules = {info.name for info in pkgutil.iter_modules(map_fns.__path__)} - {'registration', 'systems', 'turns'}
    assert {function.__module__.rsplit('.', 1)[1] for function in formats().values()} == modules


@pytest.mark.parametrize('name', sorted(formats()))
def test_a_record_of_each_format_becomes_a_question_and_its_answer(name):
    [messages] = texts(name, RECORDS[name])
    roles = [role for role, _ in messages]
    assert roles in (['user', 'assistant'], ['system', 'user', 'assistant'], ['text'])
    assert all(text for _, text in messages)


@pytest.mark.parametrize('name', sorted(formats()))
def test_a_record_without_its_columns_names_them_and_the_nearest_format(name):
    columns = formats()[name].columns
    with pytest.raises(DataError, match=rf'file:7: `{name}_map_fn` needs the column.*{columns[0]}.*; found other; '):
        apply_map_fn(formats()[name], Record('file:7', {'other': 1}))


@pytest.mark.parametrize('name', sorted(formats()))
@pytest.mark.parametrize('value', [None, 3, [], {}, '', [None], ['x'], {'a': 1}, [{'from': 3}], True])
def test_any_value_in_any_column_is_a_data_error_or_a_conversation(name, value):
    for column in formats()[name].columns:
        try:
            found = apply_map_fn(formats()[name], Record('file:7', {**RECORDS[name], column: value}))
        except DataError as error:
            assert str(error).startswith('file:7: ')
        else:
            assert all(m.content is not None for conversation in found for m in conversation.messages)


DETECTED_AS_ANOTHER = {
    'crime_kg_assitant': 'default', 'medical': 'alpaca', 'wizardlm': 'sharegpt', 'msagent_react': 'sharegpt',
    'oasst_tree_all': 'oasst_tree', 'code_alpaca': 'prompt_completion', 'tiny_codes': 'prompt_response',
    'sql': 'context_question_answer', 'law_reference': 'gsm8k',
}  # fmt: skip
NEVER_DETECTED = {'arxiv', 'colors'}


@pytest.mark.parametrize('name', sorted(set(formats()) - NEVER_DETECTED))
def test_formats_are_detected(name):
    assert detect_map_fn(RECORDS[name], 'file:1') is formats()[DETECTED_AS_ANOTHER.get(name, name)]


@pytest.mark.parametrize('name', sorted(formats()))
def test_detection_adds_no_text(name):
    """A system text of ours, or words around the data's, come only with a map function that is named."""
    record = RECORDS[name]
    try:
        function = detect_map_fn(record, 'file:1')
    except ConfigError as error:
        assert name in NEVER_DETECTED
        assert f'the nearest is `{name}`' in str(error)
        return
    given = json.dumps(record, ensure_ascii=False)
    for conversation in apply_map_fn(function, Record('file:1', record)):
        for message in conversation.messages:
            assert all(word in given for word in message.content.split())


def test_an_unknown_format_names_the_nearest():
    text = r'file:1: no known format has the columns instruction, reply; the nearest is `alpaca`'
    with pytest.raises(ConfigError, match=text):
        detect_map_fn({'instruction': 1, 'reply': 2}, 'file:1')
    with pytest.raises(ConfigError, match='no known format has the columns list'):
        detect_map_fn([1], 'file:1')


@pytest.mark.torch
def test_a_function_of_ones_own_needs_no_registration():
    def mine(example):
        return {'conversation': [{'input': example['x'], 'output': 'y'}]}

    assert resolve_map_fn(mine) is mine
    assert resolve_map_fn('json:loads') is json.loads
    for wrong, text in (('json:nothing', "'json:nothing' cannot be"), ('json:__name__', 'a str, which is not callable'),
                        ('alpacca', "did you mean 'alpaca'"), (3, 'must be a name')):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            resolve_map_fn(wrong)
