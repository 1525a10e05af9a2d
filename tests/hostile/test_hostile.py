"""Hostile files at every entry point: one line of error or none, no code run, nothing fetched, nothing that hangs.

The cases are made from the schemas of the files (`cases.py`) and run in forks of one process (`server.py`).
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.hostile.cases import ENTRIES, FILE_KINDS, VALUES, Case, all_cases
from tests.hostile.world import write_manifest

CASES = list(all_cases())
_STUB = """
import pathlib
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return self
def get_kernel(name, *args, **kwargs):
    with open({log!r}, 'a') as file:
        print(name, file=file)
    raise ImportError(name)
def use_kernel_forward_from_hub(name):
    return lambda cls: cls
def use_kernelized_func(*functions):
    return lambda cls: cls
def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)
    return Anything
"""


class Server:
    """The process that runs the cases, and what would notice that something was run or fetched."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.touched, self.kernels = folder, folder / 'touched', folder / 'kernels.log'
        self.asked: list[str] = []
        self._hub = self._listen()
        (code := folder / 'code').mkdir()
        canary = f'open({str(self.touched)!r}, "a").write(__name__)\n'
        (code / 'canary_of_a_stranger.py').write_text(canary)
        (code / 'kernels').mkdir()
        (code / 'kernels' / '__init__.py').write_text(_STUB.format(log=str(self.kernels)))
        (code / 'kernels-0.18.2.dist-info').mkdir()
        (code / 'kernels-0.18.2.dist-info' / 'METADATA').write_text(
            'Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n'
        )
        env = os.environ | {
            'PYTHONPATH': os.pathsep.join([str(code), str(ROOT)]), 'HF_HUB_OFFLINE': '0', 'OMP_NUM_THREADS': '1',
            'HF_ENDPOINT': f'http://127.0.0.1:{self._hub.server_port}', 'HF_HOME': str(folder / 'hf'),
            'XTUNER_CACHE': str(folder / 'cache'), 'HF_HUB_ETAG_TIMEOUT': '2', 'HF_HUB_DISABLE_TELEMETRY': '1',
            'PYTHONDONTWRITEBYTECODE': '1', 'CUDA_VISIBLE_DEVICES': '',
        }  # fmt: skip
        self.world = folder / 'world'
        with (folder / 'server.log').open('wb') as log:
            self._process = subprocess.Popen(
                [sys.executable, '-m', 'tests.hostile.server', str(self.world)], cwd=ROOT, env=env, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self._out().readline() == 'ready\n', (folder / 'server.log').read_text()[-2000:]
        self.kernels.unlink(missing_ok=True)  # bitsandbytes asks for one of its own when it is imported

    def _out(self) -> Any:
        return self._process.stdout

    def _listen(self) -> http.server.HTTPServer:
        asked = self.asked

        class Hub(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_error(404)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args: Any) -> None:
                pass

        server = http.server.HTTPServer(('127.0.0.1', 0), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def run(self, argv: list[str], folder: Path, stdin: str = '') -> dict[str, Any]:
        """Status and stderr of a command line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({'argv': argv, 'folder': str(folder), 'stdin': stdin}) + '\n')
        self._process.stdin.flush()
        return json.loads(self._out().readline())

    def alarms(self) -> list[str]:
        """What was run or fetched since it was last asked."""
        found = [f'hub: {path}' for path in self.asked]
        self.asked.clear()
        for file in (self.touched, self.kernels):
            if file.exists():
                found.append(f'{file.name}: {file.read_text().split()}')
                file.unlink()
        return found

    def close(self) -> None:
        """Ends both processes."""
        self._process.communicate()
        self._hub.shutdown()


@pytest.fixture(scope='session')
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp('hostile'))
    yield server
    server.close()


def copy_world(world: Path, folder: Path) -> None:
    """Makes `folder` like the sound one; weights, which no case writes to, are linked."""

    def copy(source: str, target: str) -> None:
        if source.endswith('.safetensors'):
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(world, folder, copy_function=copy)


def hostile_folder(world: Path, folder: Path, case: Case) -> list[str]:
    """A copy of the world with one thing changed; returns the case's command line."""
    copy_world(world, folder)
    for place in ('adapter', 'model', 'run/checkpoint-00000001', '.'):
        shutil.copyfile(world.parent / 'code' / 'canary_of_a_stranger.py', folder / place / 'canary_of_a_stranger.py')
    argv = list(ENTRIES[case.entry].argv)
    if case.file == 'options':
        return [*argv, '--cfg-options', f'{case.field}={_option(VALUES[case.kind])}']
    path = folder / case.file
    if case.field:
        _set_field(path, case.field, VALUES[case.kind])
    else:
        _spoil(path, case.kind)
    if path.parent.name.startswith('checkpoint-') and path.name != 'manifest.json':
        write_manifest(path.parent)
    return argv


def _option(value: Any) -> str:
    return value.replace('\x00', '') if isinstance(value, str) else repr(value)


def _set_field(path: Path, field: str, value: Any) -> None:
    lines = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
    content = json.loads(lines[0])
    here, (*within, last) = content, field.replace('|', '.').split('.', 1)
    if path.name == 'data.jsonl' and field in ('role', 'content', 'loss'):
        here = content['messages'][1]
    elif within and isinstance(here.get(within[0]), dict | type(None)):
        here = here.setdefault(within[0], {}) or here.update({within[0]: {}}) or here[within[0]]
    here[last] = value
    path.write_text('\n'.join([json.dumps(content), *lines[1:]]) + '\n')


def _spoil(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind == 'named pipe':
        os.mkfifo(path)
    elif kind == 'link to itself':
        path.symlink_to(path)
    elif kind == 'folder':
        path.mkdir()
    elif kind == 'device':
        path.symlink_to('/dev/zero')
    else:
        path.write_bytes({
            'empty': b'', 'cut': content[: len(content) // 2], 'a list': b'[]', 'null file': b'null',
            'a number': b'1e999', 'deep file': b'[' * 200_000, 'not UTF-8': b'\xff\xfe' + content,
            'long digits': b'{"x": ' + b'9' * 5000 + b'}',
            'key twice': content.rstrip()[:-1] + b', "x": 1, "x": 2}',
        }[kind])  # fmt: skip


def faults(case: Case, answer: dict[str, Any], alarms: list[str]) -> list[str]:
    """What is wrong with how a command took a hostile file."""
    status, lines = answer['status'], answer['err'].splitlines()
    errors = [line for line in lines if line.startswith('xtuner: error: ')]
    wrong = list(alarms)
    if status not in (0, 1, 2):
        wrong.append(f'status {status} after {answer["seconds"]} s')
    told = case.entry == 'check-custom-dataset' and not errors  # its result, on standard output
    if status in (1, 2) and not told and (len(errors) != 1 or lines[-1] != errors[0]):
        wrong.append(f'{len(errors)} lines of error')
    wrong += [f'{word!r} is said' for word in ('unexpected ', 'Traceback', '\x1b', '\x07') if word in answer['err']]
    wrong += [f'a line of {len(line)} characters' for line in errors if len(line) > 2000]
    return wrong and [f'{case.name}: {", ".join(wrong)}: {" | ".join(lines[-2:])[-400:]}']


@pytest.mark.parametrize('entry', ENTRIES)
def test_hostile_files(entry: str, server: Server) -> None:
    found, refused = [], 0
    folder = server.folder / 'case'
    for case in (case for case in CASES if case.entry == entry):
        argv = hostile_folder(server.world, folder, case)
        answer = server.run(argv, folder, ENTRIES[entry].stdin)
        refused += answer['status'] in (1, 2)
        found += faults(case, answer, server.alarms())
    assert not found, '\n'.join(found)
    assert refused or entry == 'doctor'


@pytest.mark.parametrize('entry', ENTRIES)
def test_the_sound_world_is_taken(entry: str, server: Server) -> None:
    folder = server.folder / 'sound'
    copy_world(server.world, folder)
    answer = server.run(list(ENTRIES[entry].argv), folder, ENTRIES[entry].stdin)
    assert answer['status'] == 0, answer['err']
    assert not server.alarms()


def test_every_pair_is_there() -> None:
    pairs = {(case.entry, case.kind) for case in CASES}
    assert pairs >= {(entry, kind) for entry in ENTRIES for kind in (*VALUES, *FILE_KINDS)} - {
        ('train options', kind) for kind in FILE_KINDS
    }
    assert len(CASES) >= 300


def test_the_canaries_sing(server: Server) -> None:
    """What the cases look for would be noticed."""
    folder = server.folder / 'sound'
    copy_world(server.world, folder)
    server.run([*ENTRIES['train options'].argv, '--cfg-options', 'dataset.map_fn=canary_of_a_stranger:x'], folder)
    assert any('touched' in alarm for alarm in server.alarms())
    answer = server.run(['chat', 'evil/evil'], folder)
    assert answer['status'] == 1
    assert any('hub' in alarm for alarm in server.alarms())
