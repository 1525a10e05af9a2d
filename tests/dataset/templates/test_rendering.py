"""Chat templates are rendered as transformers does, within bounds, and nothing of a rendering outlives its bound."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.dataset.conftest import all_markers, make_tokenizer
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.check import check_dataset
from xtuner.dataset.encode import conversation_encoder
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.templates import worker_pool
from xtuner.dataset.templates.builtin import TEMPLATES, get_template
from xtuner.dataset.templates.rendering import Chat, ChatTemplate, render_chats
from xtuner.errors import ConfigError, DataError

FOLDER = ROOT.parent / 'shared' / 'templates'
PLAIN = '{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}'
LOOP = ''.join(f'{{% for {name} in range(99999) %}}' for name in 'abc') + '{% endfor %}' * 3
# Loops on one particular message alone.
TRAP = "{% for m in messages %}{% if 'loop' in m.content %}" + LOOP + '{% endif %}{% endfor %}' + PLAIN


def shown(text, *contents, views=None):
    messages = [{'role': ('user', 'assistant')[i % 2], 'content': content} for i, content in enumerate(contents)]
    template = ChatTemplate(text, '/models/x', {'bos_token': '<s>'})
    return next(render_chats(template, [Chat(messages, None, views or [(len(messages), False)], 'file:7')]))


def renderers(parent: int | None = None) -> dict[int, str]:
    """The processes that render for a process, and their states: 'S' waits, 'R' computes, 'Z' is not reaped."""
    found = {}
    for folder in Path('/proc').iterdir():
        try:
            stat = (folder / 'stat').read_text().rsplit(')', 1)[1].split() if folder.name.isdigit() else None
            if (
                stat
                and int(stat[1]) == (parent or os.getpid())
                and b'template_worker' in (folder / 'cmdline').read_bytes()
            ):
                found[int(folder.name)] = stat[0]
        except OSError:
            continue
    return found


def assert_idle():
    """No process computes any more, or waits to be reaped; one that has just answered may need a moment."""
    until = time.monotonic() + 0.4
    while set(renderers().values()) - {'S'} and time.monotonic() < until:
        time.sleep(0.01)
    assert set(renderers().values()) <= {'S'}


def test_what_a_template_says_of_itself_moves_no_cursor():
    error = shown('{{ raise_exception("\x1b[2J\n\u202eevil" ~ "x" * 1000) }}', 'Hi')
    assert str(error).startswith('file:7: the chat template rejects the conversation: ␛[2J \\u202eevilxxx')
    assert len(str(error)) < 300 and str(error).isprintable()
    assert 'unsafe' in str(shown('{{ ().__class__.__mro__ }}', 'Hi'))
    with pytest.raises(ConfigError, match=r'chat template of /models/x is not valid Jinja: line 2: .*; use a built-in'):
        shown('a\n{% if %}', 'Hi')


CONVERSATIONS = [
    [{'role': 'user', 'content': 'Hi'}],
    [{'role': 'system', 'content': ' Be good.\n'}, {'role': 'user', 'content': '  <b>你好</b> \\ "x" \u2028'},
     {'role': 'assistant', 'content': 'Yes.', 'reasoning': 'hm'}, {'role': 'user', 'content': 'And?', 'name': None}],
    [{'role': 'user', 'content': '2+2'}, {'role': 'user', 'content': 'now'}],
    [{'role': 'user', 'content': 'sum'},
     {'role': 'assistant', 'content': None, 'tool_calls': [
         {'id': 'abcdefghi', 'type': 'function',
          'function': {'name': 'add', 'arguments': {'a': 1.5, 'b': [True, None]}}}]},
     {'role': 'tool', 'content': '3', 'tool_call_id': 'abcdefghi', 'name': 'add'}],
]  # fmt: skip
TOOLS = [{'type': 'function', 'function': {'name': 'add', 'description': 'Adds <é>', 'parameters': {
    'type': 'object', 'properties': {'a': {'type': 'number'}}, 'required': ['a']}}}]  # fmt: skip


def compare(tokenizer, text):
    """Renders every conversation in both ways; returns how many both rendered."""
    tokenizer.chat_template = text
    template = ChatTemplate(text, 'x', tokenizer.special_tokens_map)
    rendered = 0
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for prompt in (False, True):
                try:
                    expected = tokenizer.apply_chat_template(
                        messages, tools, add_generation_prompt=prompt, tokenize=False
                    )
                except Exception as error:
                    expected = str(error)
                [found] = render_chats(template, [Chat(messages, tools, [(len(messages), prompt)], 'x')])
                if isinstance(found, DataError):
                    assert 'underscore' in str(found) or ' '.join(expected.split())[:20] in str(found)
                else:
                    assert found == [expected]
                    rendered += 1
    return rendered


@pytest.mark.parametrize('name', sorted(TEMPLATES.module_dict))
def test_our_templates_are_rendered_as_by_transformers(name):
    assert compare(make_tokenizer(all_markers()), get_template(name).chat_template()) >= 4


@pytest.mark.parametrize('name', [file.name for file in sorted(FOLDER.glob('*.jinja'))] or ['none'])
def test_published_templates_are_rendered_as_by_transformers(name):
    if not (FOLDER / name).is_file():
        pytest.skip(f'{FOLDER} is absent: published chat templates lie there where they are available')
    assert compare(make_tokenizer(['<|end|>']), (FOLDER / name).read_text(encoding='utf-8')) >= 4


def test_views_come_back_as_if_each_were_rendered_alone():
    text = ('{% for m in messages %}{{ m.content if loop.last else m.content[:3] }};{% endfor %}'
            "{{ 'A:' if add_generation_prompt }}")  # fmt: skip
    contents = ['one é', 'two two', 'three', 'four four']
    views = [(4, False), (1, True), (2, False), (3, True), (4, True)]
    alone = [shown(text, *contents, views=[view])[0] for view in views]
    assert shown(text, *contents, views=views) == alone
    assert alone[2] == 'one;two two;'


def test_one_record_on_which_the_template_loops_is_bad_and_the_others_are_used(short, tmp_path):
    tokenizer = make_tokenizer(['<|end|>'])
    tokenizer.chat_template = TRAP
    template = get_template('from_tokenizer', tokenizer)
    lines = [f'{{"messages": [{{"role": "user", "content": "{"loop" if n in (3, 8) else n}"}}, '
             f'{{"role": "assistant", "content": "a{n}"}}]}}' for n in range(12)]  # fmt: skip
    (tmp_path / 'data.jsonl').write_text('\n'.join(lines))
    config = DatasetConfig(source=str(tmp_path / 'data.jsonl'), on_bad_record='skip', max_length=64)
    summary = check_dataset(config, tokenizer=tokenizer, template=template)
    assert summary.counts == {'bad': 2} and summary.kept == 10
    assert 'data.jsonl:4: the chat template of' in summary.examples['bad'][0]
    assert 'data.jsonl:9: ' in summary.examples['bad'][1]
    began = time.monotonic()
    with pytest.raises(DataError, match=r'data.jsonl:4: the chat template of .* CPU time'):
        prepare_dataset(DatasetConfig(source=config.source, max_length=64), tokenizer=tokenizer, template=template)
    assert time.monotonic() - began < 30
    assert_idle()


def test_many_such_records_end_the_preparation_and_nothing_behind_the_first_is_rendered_where_it_stops(
    short, tmp_path, monkeypatch
):
    monkeypatch.setattr(conversation_encoder, '_MAX_OVER_BOUND', 3)
    tokenizer = make_tokenizer(['<|end|>'])
    tokenizer.chat_template = TRAP
    template = get_template('from_tokenizer', tokenizer)
    line = '{"messages": [{"role": "user", "content": "loop"}, {"role": "assistant", "content": "a"}]}'
    (tmp_path / 'data.jsonl').write_text('\n'.join([line] * 200))
    ran = []
    run = worker_pool.POOL.run
    monkeypatch.setattr(worker_pool.POOL, 'run', lambda *args: ran.append(1) or run(*args))
    for policy, message, most in (('error', 'data.jsonl:1: the chat template of', 1), ('skip', 'giving up', 3)):
        ran.clear()
        config = DatasetConfig(source=str(tmp_path / 'data.jsonl'), max_length=64, on_bad_record=policy)
        with pytest.raises(DataError, match=message):
            prepare_dataset(config, tokenizer=tokenizer, template=template)
        assert len(ran) == most


def test_a_template_that_always_loops_is_refused_as_it_is_chosen(short):
    tokenizer = make_tokenizer(['<|end|>'])
    tokenizer.chat_template = LOOP
    with pytest.raises(ConfigError, match=r'the chat template of the tokenizer took more than .*name another template'):
        get_template('from_tokenizer', tokenizer)


def test_nothing_else_renders_a_chat_template():
    """transformers would run it here, without bounds; its name may stand in a text."""
    for file in (ROOT / 'xtuner').rglob('*.py'):
        names = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text(encoding='utf-8')))
            if isinstance(node, ast.Attribute)
        }
        assert not names & {'apply_chat_template', 'render_jinja_template', 'encode_message_with_chat_template'}, file
