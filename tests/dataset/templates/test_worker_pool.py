"""Processes that render chat templates."""

from __future__ import annotations

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

from tests.dataset.conftest import make_tokenizer
from tests.dataset.templates.test_rendering import LOOP, PLAIN, TRAP, assert_idle, renderers, shown
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.stream import PackStream
from xtuner.dataset.templates import worker_pool
from xtuner.dataset.templates.builtin import get_template
from xtuner.dataset.templates.rendering import TemplateBoundError


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
