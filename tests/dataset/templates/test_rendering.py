"""Chat templates are rendered as transformers does, within bounds, and nothing of a rendering outlives its bound."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from tests.conftest import ROOT
from tests.dataset.conftest import all_markers, make_tokenizer
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.check import check_dataset
from xtuner.dataset.encode import conversation_encoder
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.stream import PackStream
from xtuner.dataset.templates import rendering, worker_pool
from xtuner.dataset.templates.builtin import TEMPLATES, get_template
from xtuner.dataset.templates.rendering import Chat, ChatTemplate, TemplateBoundError, render_chats
from xtuner.errors import ConfigError, DataError

FOLDER = ROOT.parent / 'shared' / 'templates'
PLAIN = '{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}'
LOOP = ''.join(f'{{% for {name} in range(99999) %}}' for name in 'abc') + '{% endfor %}' * 3
# Loops on one particular message alone.
TRAP = "{% for m in messages %}{% if 'loop' in m.content %}" + LOOP + '{% endif %}{% endfor %}' + PLAIN

# What a template may try, and the bound that it meets.
HOSTILE = {
    'loops': (LOOP, 'CPU time'),
    'a long text': ("{{ 'a' * 10**10 }}", 'memory'),
    'a long format': ("{{ '%1000000000d' % 1 }}", 'memory'),
    'a long new format': ("{{ '{:>10000000000}'.format(1) }}", 'memory'),
    'a long number': ("{{ 7**(10**8) }}", 'CPU time'),
    'center': ("{{ 'a'|center(10**10) }}", 'memory'),
    'indent': ("{{ ('a\n' * 10**6)|indent(10**6) }}", 'memory|CPU time'),
    'lipsum': ('{{ lipsum(n=10**9) }}', 'CPU time'),
    'doubling': ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
                 'memory|CPU time'),
    'recursion': ('{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}', 'recurses too deeply'),
    'join': ("{{ (['a' * 1000] * 10**7)|join }}", 'memory|CPU time'),
    'sort': ("{{ (('a ' * 10**7).split(' '))|sort|length }}", 'memory|CPU time'),
    'split': ("{% for i in range(99999) %}{% set x = ('ab' * 10**6).split('b') %}{% endfor %}", 'CPU time'),
    'replace': ("{{ ('a' * 10**5).replace('a', 'a' * 10**5) }}", 'memory'),
    'batch': ("{{ range(9)|batch(10**9, 'x')|list }}", 'memory'),
    'much text': ("{{ 'a' * 3000000 }}", 'wrote more than'),
    'nested at compile time': ('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', 'recurses too deeply'),
    'long at compile time': ('{{ ' + '+'.join(['1'] * 100000) + ' }}', 'recurses too deeply|CPU time'),
    'an error of endless text': ('{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}'
                                 '{% endfor %}{{ raise_exception(n.a) }}', 'memory|CPU time'),
}  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """A bound that tests can wait for."""
    monkeypatch.setattr(rendering, 'SECONDS', 0.5)


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


@pytest.mark.parametrize('case', HOSTILE)
def test_a_bound_ends_a_rendering_with_one_line_and_nothing_of_it_is_left(case, short):
    text, bound = HOSTILE[case]
    shown(PLAIN, 'Hi')
    error = shown(text, 'Hi')
    assert isinstance(error, TemplateBoundError), error
    assert '\n' not in str(error) and len(str(error)) < 300
    assert str(error).startswith('file:7: the chat template of /models/x ')
    assert any(part in str(error) for part in bound.split('|')), error
    assert_idle()
    assert shown(PLAIN, 'Hi') == ['user: Hi<|end|>']


def test_what_a_template_says_of_itself_moves_no_cursor():
    error = shown('{{ raise_exception("\x1b[2J\n\u202eevil" ~ "x" * 1000) }}', 'Hi')
    assert str(error).startswith('file:7: the chat template rejects the conversation: ␛[2J \\u202eevilxxx')
    assert len(str(error)) < 300 and str(error).isprintable()
    assert 'unsafe' in str(shown('{{ ().__class__.__mro__ }}', 'Hi'))
    with pytest.raises(ConfigError, match=r'chat template of /models/x is not valid Jinja: line 2: .*; use a built-in'):
        shown('a\n{% if %}', 'Hi')


def test_the_process_has_no_files_and_no_environment_of_ours(monkeypatch):
    monkeypatch.setenv('CANARY', 'mine')
    file = (ROOT / 'README.md').open()
    worker_pool.POOL.close()
    shown(PLAIN, 'Hi')
    [pid] = renderers()
    assert b'CANARY' not in Path(f'/proc/{pid}/environ').read_bytes()
    assert sorted(os.listdir(f'/proc/{pid}/fd')) == ['0', '1', '2']
    limits = Path(f'/proc/{pid}/limits').read_text()
    assert [line.split()[-3] for line in limits.splitlines() if line.startswith('Max open files')] == ['3']
    assert b'libtorch' not in Path(f'/proc/{pid}/maps').read_bytes()
    file.close()


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
FEATURES = {
    'blocks': '  {% for m in messages %}\n  {%- if loop.first %}\n  {{ m.role }}\n  {% endif %}\n\n{% endfor %}\n x\n',
    'tojson': '{{ tools|tojson }}{{ messages|tojson(indent=2) }}{{ {"b": "é<>", "a": 1}|tojson(sort_keys=true) }}',
    'loopcontrols': '{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 4 %}{% break %}{% endif %}{{ i }}'
                    '{% endfor %}',
    'generation': '{% for m in messages %}{% set x = 1 %}{% generation %}{{ m.content }}{% set x = 2 %}'
                  '{% endgeneration %}{{ x }}{% endfor %}',
    'time': "{{ strftime_now('%Y %B %d %A') }}",
    'namespace': '{% set n = namespace(self=1, x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}'
                 '{{ n.x }}{{ n.self }}',
    'underscore': '{% set n = namespace(_x=1) %}{{ n._x }}',
    'underscore later': '{% set n = namespace() %}{% set n._x = 1 %}{{ n }}',
    'dict': "{{ dict(a=1, **{'b': 2}) }}{{ dict.fromkeys('ab', 1) }}{{ dict.mro }}",
    'variables': '{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}{{ documents }}'
                 '{{ add_generation_prompt }}',
    'reasoning': '{% for m in messages %}{{ m }}{% endfor %}',
    'mutation': '{{ messages.append(1) }}',
    'undefined': '{{ nothing.here }}',
    'own error': '{{ raise_exception("no") }}',
    'literals': r'{{ "\N{BULLET}\x41é\n" }}{{ "é".encode("utf-16") }}{{ "é".encode("latin-1") }}',
    'filters': "{{ 'a b c'|wordwrap(2) }}{{ messages|pprint }}{{ '<a>&amp;'|striptags }}{{ '<'|e }}{{ 'x'|indent }}"
               "{{ 'see http://a.b'|urlize }}{{ {'a': '<'}|xmlattr }}{{ lipsum(n=0) }}{{ 12345|filesizeformat }}",
}  # fmt: skip


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


@pytest.mark.parametrize('name', FEATURES)
def test_the_environment_is_that_of_transformers(name):
    rendered = compare(make_tokenizer(['<|end|>']), FEATURES[name])
    assert rendered == (0 if name in ('underscore', 'underscore later', 'mutation', 'undefined', 'own error') else 16)


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


def test_slow_renderings_leave_the_quick_ones_their_places(short):
    errors = []
    threads = [threading.Thread(target=lambda: errors.append(shown(TRAP, 'loop'))) for _ in range(6)]
    for thread in threads:
        thread.start()
    during = 0
    while any(thread.is_alive() for thread in threads):
        during += shown(TRAP, 'Hi') == ['user: Hi<|end|>']
        computing = sum(state == 'R' for state in renderers().values())
        assert computing <= worker_pool._QUICK_SLOTS + worker_pool._SLOW_SLOTS
    for thread in threads:
        thread.join()
    assert during > 10
    assert len(errors) == 6 and all(isinstance(error, TemplateBoundError) for error in errors)
    assert_idle()


def test_callers_beyond_those_that_may_wait_are_sent_away(short, monkeypatch):
    monkeypatch.setattr(worker_pool.POOL, '_waiting', threading.Semaphore(0))
    monkeypatch.setattr(worker_pool.POOL, '_slow', threading.Semaphore(0))
    assert 'try again' in str(shown(TRAP, 'loop'))
    assert shown(TRAP, 'Hi') == ['user: Hi<|end|>']


def test_a_process_that_waits_for_the_processor_is_not_slow(monkeypatch):
    """As on a machine with much else to do: by the clock it takes long, but it does not compute."""
    shown(PLAIN, 'Hi')
    monkeypatch.setattr(worker_pool.POOL, '_waiting', threading.Semaphore(0))
    monkeypatch.setattr(worker_pool.POOL, '_slow', threading.Semaphore(0))
    pids = list(renderers())
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    going_on = threading.Timer(0.4, lambda: [os.kill(pid, signal.SIGCONT) for pid in pids])
    going_on.start()
    assert shown(PLAIN, 'Hi') == ['user: Hi<|end|>']
    going_on.join()


def test_a_process_that_somebody_else_ends_is_replaced():
    shown(PLAIN, 'Hi')
    for pid in renderers():
        os.kill(pid, signal.SIGKILL)
    assert shown(PLAIN, 'Hi') == ['user: Hi<|end|>']
    assert 'Z' not in renderers().values()


def test_a_fork_renders_in_processes_of_its_own():
    shown(PLAIN, 'Hi')
    mine = set(renderers())
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        good = shown(PLAIN, 'Hi') == ['user: Hi<|end|>'] and not mine & set(renderers())
        os.write(writer, b'1' if good else b'0')
        os._exit(0)
    assert os.read(reader, 1) == b'1'
    os.waitpid(child, 0)
    os.close(reader), os.close(writer)
    assert shown(PLAIN, 'Hi') == ['user: Hi<|end|>'] and mine <= set(renderers())


SCRIPT = """
    import os, signal, sys, threading, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with `&` ignore it
    from xtuner.dataset.templates.rendering import Chat, ChatTemplate, render_chats
    from xtuner.dataset.templates.worker_pool import POOL
    def show(text):
        chat = Chat([{'role': 'user', 'content': 'a'}], None, [(1, False)], 'x')
        return next(render_chats(ChatTemplate(text, 'x'), [chat]))
    show('x')
    if sys.argv[1] == 'fork' and not os.fork():  # as data workers do; it outlives its parent here
        print('fork', os.getpid(), flush=True)
        time.sleep(600)
    threading.Thread(target=show, args=[sys.argv[2]], daemon=True).start()
    time.sleep(0.5)
    print('workers', *[worker.process.pid for worker in POOL._workers], flush=True)
    time.sleep(600)
"""  # fmt: skip


@pytest.mark.parametrize('how', ['INT', 'TERM', 'KILL', 'fork'])
def test_however_a_process_ends_its_renderers_end(how):
    script = textwrap.dedent(SCRIPT)
    child = subprocess.Popen([sys.executable, '-c', script, how, LOOP], stdout=subprocess.PIPE, text=True)
    words = {line.split()[0]: [int(word) for word in line.split()[1:]]
             for line in (child.stdout.readline() for _ in range(1 + (how == 'fork')))}  # fmt: skip
    pids = words['workers']
    assert pids and all(Path(f'/proc/{pid}').exists() for pid in pids)
    child.send_signal(getattr(signal, f'SIG{how}', signal.SIGKILL))
    child.wait()
    until = time.monotonic() + 60  # the looping one has its two seconds of CPU time, on a busy machine
    while alive := [pid for pid in pids if Path(f'/proc/{pid}').exists()]:
        assert time.monotonic() < until, alive
        time.sleep(0.1)
    if how == 'fork':
        os.kill(words['fork'][0], signal.SIGKILL)


def test_workers_of_a_data_loader_render_while_their_parent_does(tmp_path):
    tokenizer = make_tokenizer(['<|end|>'])
    tokenizer.chat_template = PLAIN
    template = get_template('from_tokenizer', tokenizer)  # rendered here before the workers are forked
    lines = [f'{{"messages": [{{"role": "user", "content": "q{n}"}}, {{"role": "assistant", "content": "a{n}"}}]}}'
             for n in range(300)]  # fmt: skip
    (tmp_path / 'data.jsonl').write_text('\n'.join(lines))
    config = DatasetConfig(source=str(tmp_path / 'data.jsonl'), max_length=256)
    found = {}
    for workers in (0, 2):
        stream = PackStream(config, tokenizer=tokenizer, template=template, window=50)
        packs = []
        for pack in DataLoader(stream, batch_size=None, num_workers=workers, timeout=120 * bool(workers)):
            packs.append(tuple(pack['input_ids'].flatten().tolist()))
            assert shown(PLAIN, 'Hi') == ['user: Hi<|end|>']
        found[workers] = sorted(packs)
    assert found[0] == found[2] and len(found[0]) > 10


def test_nothing_else_renders_a_chat_template():
    """transformers would run it here, without bounds; its name may stand in a text."""
    for file in (ROOT / 'xtuner').rglob('*.py'):
        names = {
            node.attr
            for node in ast.walk(ast.parse(file.read_text(encoding='utf-8')))
            if isinstance(node, ast.Attribute)
        }
        assert not names & {'apply_chat_template', 'render_jinja_template', 'encode_message_with_chat_template'}, file
