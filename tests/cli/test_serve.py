"""`xtuner serve` as a process: it says where it listens, ends in good order, and says what is wrong with a call."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xtuner.cli.main import main
from xtuner.cli.serve import add_arguments, read_key


class Process:
    """The command, and what it said; `before` is a program that runs first."""

    def __init__(self, *words: str, before: str = '', **environment: str) -> None:
        program = f'{before}\nfrom xtuner.cli.main import command\ncommand()'
        self.process = subprocess.Popen(
            [sys.executable, '-c', program, 'serve', *words],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | environment,
        )  # fmt: skip
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        self.lines.extend(iter(self.process.stderr.readline, ''))

    def wait_for(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := re.search(pattern, ''.join(self.lines)):
                return found
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        raise AssertionError(f'{pattern} never came: {self.lines}')

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        status = self.process.wait(30)
        self._reader.join(5)
        return status


@pytest.fixture
def service(tiny_internlm: Path, tmp_path: Path) -> Iterator[Process]:
    (tmp_path / 'key').write_text('open-sesame\n', encoding='utf-8')
    process = Process(str(tiny_internlm), '--port', '0', '--prompt-template', 'internlm_chat', '--max-streams', '2',
                      '--temperature', '0', '--api-key-file', str(tmp_path / 'key'))  # fmt: skip
    yield process
    process.process.kill()
    process.process.wait()


def test_a_stream_under_way_is_ended_before_the_process(service: Process, tiny_internlm: Path) -> None:
    """SIGTERM: no new connection, the answer comes whole, exit status 0."""
    from openai import APIConnectionError, OpenAI

    url = service.wait_for(r'serving at (http://127\.0\.0\.1:\d+/v1)').group(1)
    client = OpenAI(base_url=url, api_key='open-sesame', max_retries=0)
    messages: Any = [{'role': 'user', 'content': 'Hello'}]
    options: Any = {'model': tiny_internlm.name, 'messages': messages, 'max_tokens': 1500, 'seed': 3}
    stream = client.chat.completions.create(**options, stream=True)
    pieces = [next(stream), next(stream)]
    service.process.send_signal(signal.SIGTERM)
    pieces += stream
    assert pieces[-1].choices[0].finish_reason in ('length', 'stop')
    assert service.process.wait(30) == 0
    with pytest.raises(APIConnectionError):
        client.models.list()
    said = ''.join(service.lines)
    assert 'chat 200' in said
    assert 'sesame' not in said and 'Traceback' not in said


@pytest.mark.parametrize(('stuck', 'status'), [
    ('from xtuner.serve.models import ServedModel\n'
     'def loop(self, messages):\n    while True: pass\n'
     'ServedModel.render_chat = loop', 0),
    ('from xtuner.inference.batching import BatchDecoder\nimport threading\n'
     'BatchDecoder.step = lambda *_, **__: threading.Event().wait()', 1),
], ids=['a rendering', 'a step of the model'])  # fmt: skip
def test_a_signal_ends_the_process_whatever_is_stuck(tiny_internlm: Path, stuck: str, status: int) -> None:
    from openai import APIError, OpenAI

    process = Process(str(tiny_internlm), '--port', '0', '--prompt-template', 'internlm_chat', '--grace', '1',
                      before=stuck)  # fmt: skip
    try:
        url = process.wait_for(r'serving at (http://127\.0\.0\.1:\d+/v1)').group(1)
        client = OpenAI(base_url=url, api_key='none', max_retries=0)
        failed: list[APIError] = []

        def ask() -> None:
            try:
                client.chat.completions.create(model=tiny_internlm.name, messages=[{'role': 'user', 'content': 'Hi'}])
            except APIError as error:
                failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(1)
        assert asking.is_alive(), 'nothing is stuck'
        began = time.monotonic()
        assert process.end(signal.SIGTERM) == status
        assert time.monotonic() - began < 4  # grace, a second, and the machine
        asking.join(5)
        assert failed
        said = ''.join(process.lines)
        assert 'Traceback' not in said
        assert ('a thread is stuck' in said) == bool(status)
    finally:
        process.process.kill()


def test_a_wrong_call_is_one_line(tiny_internlm: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = str(tiny_internlm)
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = str(other.getsockname()[1])
        (tmp_path / 'empty').write_text('\n', encoding='utf-8')
        for words, message in [
            ([model, '--port', port], f'cannot listen on 127.0.0.1:{port}'),
            ([model, '--host', 'no.such.host.invalid', '--port', '0'], '--host no.such.host.invalid'),
            ([model, '--port', '70000'], 'must be from 0 to 65535'),
            ([model, '--api-key-file', str(tmp_path / 'none')], 'cannot be read'),
            ([model, '--api-key-file', str(tmp_path / 'empty')], 'contains no API key'),
            ([model, '--port', '0', *2 * ['--adapter', f'a={tmp_path}']], "the name 'a' is already used"),
        ]:
            assert main(['serve', *words]) == 2
            assert message in capsys.readouterr().err


def test_the_key_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('XTUNER_API_KEY', raising=False)
    assert read_key(None) == ''
    monkeypatch.setenv('XTUNER_API_KEY', 'from-environment')
    assert read_key(None) == 'from-environment'
    (tmp_path / 'key').write_text('  from-file \nsecond line\n', encoding='utf-8')
    assert read_key(tmp_path / 'key') == 'from-file'


def test_a_word_of_warning_where_others_can_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The address is any of this machine's, and is let go as there is no model; nothing connects to it."""
    for key, words in (('', 'WITHOUT AN API KEY'), ('open-sesame', 'with the API key')):
        monkeypatch.setenv('XTUNER_API_KEY', key)
        assert main(['serve', str(tmp_path / 'none'), '--host', '0.0.0.0', '--port', '0']) == 1
        said = capsys.readouterr().err
        assert words in said and 'sesame' not in said


def test_without_its_extra_the_command_says_how_to_get_it(
    tiny_internlm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    monkeypatch.delitem(sys.modules, 'xtuner.serve.server', raising=False)
    assert main(['serve', str(tiny_internlm), '--port', '0']) == 2
    assert "pip install 'xtuner[serve]'" in capsys.readouterr().err


def test_the_weight_cache_has_an_option_and_its_earlier_name() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(['model']).weight_cache
    for option in ('--no-weight-cache', '--packed'):
        assert not parser.parse_args(['model', option]).weight_cache, option
    assert '--no-weight-cache' in parser.format_help() and '--packed' not in parser.format_help()
