from __future__ import annotations

import json
import pkgutil

import pytest

import xtuner.dataset.map_fns as map_fns
from xtuner.dataset.conversation import to_conversation
from xtuner.dataset.map_fns import detect_map_fn, formats, resolve_map_fn
from xtuner.dataset.mapping.map_records import apply_map_fn
from xtuner.dataset.sources.readers import Record
from xtuner.errors import ConfigError, DataError

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


def test_a_function_of_ones_own_needs_no_registration():
    def mine(example):
        return {'conversation': [{'input': example['x'], 'output': 'y'}]}

    assert resolve_map_fn(mine) is mine
    assert resolve_map_fn('json:loads') is json.loads
    for wrong, text in (('json:nothing', "'json:nothing' cannot be"), ('json:__name__', 'is a str, which cannot'),
                        ('alpacca', "did you mean 'alpaca'"), (3, 'must be a name')):  # fmt: skip
        with pytest.raises(ConfigError, match=text):
            resolve_map_fn(wrong)


def test_what_a_map_function_raises_is_named_with_the_records_columns():
    with pytest.raises(DataError, match=r'f:2: `<lambda>` failed with ZeroDivisionError: .* has the columns x'):
        apply_map_fn(lambda example: 1 / 0, Record('f:2', {'x': 1}))
    with pytest.raises(DataError, match='f:2: a record must be a dict, got str'):
        apply_map_fn(lambda example: {}, Record('f:2', 'text'))


@pytest.mark.parametrize('name', ['alpaca', 'sharegpt', 'openai', 'conversation'])
def test_a_system_text_may_be_called_system_prompt(name):
    record = {key: value for key, value in RECORDS[name].items() if key not in ('system', 'tools')}
    if name == 'conversation':
        record = {'conversation': [{'input': 'q', 'output': 'a'}]}
    expected = texts(name, {**record, 'system': 'Be brief.'})
    assert expected[0][0] == ('system', 'Be brief.')
    assert texts(name, {**record, 'system_prompt': 'Be brief.'}) == expected
    assert texts(name, {**record, 'system': 'Be brief.', 'system_prompt': 'Be brief.'}) == expected
    assert texts(name, {**record, 'system': '', 'system_prompt': 'Be brief.'}) == expected
    with pytest.raises(DataError, match=r'file:1: `system` and `system_prompt` differ; ignore one'):
        texts(name, {**record, 'system': 'Be long.', 'system_prompt': 'Be brief.'})
    with pytest.raises(DataError, match=r'file:1: `system_prompt` must be text, got list'):
        texts(name, {**record, 'system_prompt': ['x']})


@pytest.mark.parametrize('extra', [{}, {'loss': False}, {'weight': 0}, {'name': 'x'}])
def test_a_system_text_that_the_conversation_begins_with_is_not_doubled(extra):
    turns = [{'from': 'system', 'value': 'Be brief.', **extra}, *TURN]
    [found] = texts('sharegpt', {'conversations': turns, 'system_prompt': 'Be brief.'})
    assert found == [('system', 'Be brief.'), ('user', 'q'), ('assistant', 'a')]
    messages = [{'role': 'system', 'content': 'Be brief.', **extra}, *RECORDS['openai']['messages']]
    assert texts('openai', {'messages': messages, 'system_prompt': 'Be brief.'}) == [found]


@pytest.mark.parametrize('left_out', [None, {'conversation': []}, []])
def test_a_map_function_may_leave_a_record_out(left_out):
    assert apply_map_fn(lambda example: left_out, Record('f:2', {'x': 1})) == []


def test_a_heading_in_an_answer_of_oasst1_is_content():
    record = {'text': '### Human: What? ### Assistant: So:\n### Steps\n1.### Human: no### Assistant: ok ### Human: bye'}
    assert texts('oasst1', record) == [[('user', 'What?'), ('assistant', 'So:\n### Steps\n1.'), ('user', 'no'),
                                        ('assistant', 'ok')]]  # fmt: skip


def test_a_marker_of_oasst1_out_of_turn_is_content():
    record = {'text': '### Human: Say "### Human: x" twice### Assistant: ok'}
    assert texts('oasst1', record) == [[('user', 'Say "### Human: x" twice'), ('assistant', 'ok')]]
    assert texts('oasst1', {'text': '### Human: alone'}) == []


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


def test_moss_keeps_thoughts_commands_and_results_and_takes_the_markers_off():
    turn = {'Human': '<|Human|>: hi<eoh>\n', 'Inner Thoughts': '<|Inner Thoughts|>: None<eot>\n',
            'Commands': '<|Commands|>: Search("x")<eoc>\n', 'Tool Responses': '<|Results|>: r <b><eor>\n',
            'MOSS': '<|MOSS|>: yes<eom>\n'}  # fmt: skip
    record = {'meta_instruction': 'You are MOSS.', 'chat': {'turn_2': turn, 'turn_1': turn, 'turn_10': turn}}
    [messages] = texts('moss_003_sft', record)
    assert messages[:6] == [('system', 'You are MOSS.'), ('user', 'hi'), ('thoughts', 'None'),
                            ('commands', 'Search("x")'), ('tool', 'r <b>'), ('assistant', 'yes')]  # fmt: skip
    assert len(messages) == 16


def test_msagent_calls_become_react_text_and_results_are_given():
    answer = ('Let me see.<|startofthink|>```JSON\n{"api_name": "find", "parameters": {"q": "猫"}}```<|endofthink|>'
              '<|startofexec|>a cat<|endofexec|>It is a cat.')  # fmt: skip
    turns = [{'from': role, 'value': value} for role, value in
             (('system', '[find]'), ('user', 'q'), ('assistant', answer))]  # fmt: skip
    [messages] = texts('msagent_react', {'conversations': json.dumps(turns)})
    assert [role for role, _ in messages] == ['system', 'user', 'assistant', 'user', 'assistant']
    assert messages[2][1] == 'Thought: Let me see.\nAction: find\nAction Input: {"q": "猫"}'
    assert messages[3][1] == 'Response: a cat'
    assert messages[4][1].endswith('Final Answer: It is a cat.')
    turns[2]['value'] = '<|startofthink|>__import__("os")<|endofthink|><|startofexec|>x<|endofexec|>'
    with pytest.raises(DataError, match='a plugin call is not JSON'):
        texts('msagent_react', {'conversations': turns})


@pytest.mark.real
def test_every_tree_of_openassistant_has_a_best_path(shared_data):
    for number, line in enumerate((shared_data / 'oasst_en_100_trees.jsonl').open(encoding='utf-8')):
        record = json.loads(line)
        [best] = texts('oasst_tree', record, f'{number}')
        everything = texts('oasst_tree_all', record)
        assert best in everything and best[-1][0] == 'assistant'
