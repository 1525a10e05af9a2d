"""ModelScope against a local stand-in for the hub's HTTP service; Hugging Face without a network."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
import torch

from tests.model.published import write_model, write_tokenizer
from xtuner.errors import ModelError
from xtuner.model.hub import resolve_model
from xtuner.model.loading import load_model, load_tokenizer

ID = 'Shanghai_AI_Laboratory/internlm-chat-7b'


class Hub(ThreadingHTTPServer):
    """Answers as the hub does: the list of a model's files at a revision, and each file."""

    def __init__(self, repositories: dict[tuple[str, str], Path]) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = parse_qs(url.query)
        self.server.asked.append(self.path)
        name = url.path.removeprefix('/api/v1/models/').removesuffix('/files').removesuffix('/repo')
        folder = self.server.repositories.get((name, query.get('Revision', ['master'])[0]))
        if not url.path.startswith('/api/v1/models/') or folder is None:
            self._answer(404, json.dumps({'Code': 10010205001, 'Success': False, 'Message': 'not found'}).encode())
        elif url.path.endswith('/repo/files'):
            files = [self._describe(file) for file in sorted(folder.iterdir())]
            self._answer(200, json.dumps({'Code': 200, 'Success': True, 'Data': {'Files': files}}).encode())
        else:
            self._answer(200, (folder / query['FilePath'][0]).read_bytes())

    def _describe(self, file: Path) -> dict[str, object]:
        content = file.read_bytes()
        return {'Name': file.name, 'Path': file.name, 'Type': 'blob', 'Size': len(content), 'Revision': 'abc',
                'Sha256': hashlib.sha256(content).hexdigest()}  # fmt: skip

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.fixture(scope='module')
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One for all tests: modelscope remembers where its hub is."""
    pytest.importorskip('modelscope', reason='the optional extra modelscope is not installed')
    tmp_path = tmp_path_factory.mktemp('hub')
    repositories = {}
    for revision, model in (('master', 'v1'), ('v1.0.3', 'v1-8k')):
        folder = write_tokenizer(write_model(tmp_path / revision, model, 'bin-sharded'))
        (folder / 'modeling_internlm.py').write_text('raise SystemExit("remote code ran")')
        repositories[ID, revision] = folder
    with Hub(repositories) as server, pytest.MonkeyPatch.context() as monkeypatch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv('MODELSCOPE_DOMAIN', f'127.0.0.1:{server.server_port}')
        monkeypatch.setenv('MODELSCOPE_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
        monkeypatch.setenv('MODELSCOPE_CACHE', str(tmp_path / 'cache'))
        yield server
        server.shutdown()


def test_a_model_from_modelscope(hub: Hub) -> None:
    model = load_model(f'modelscope:{ID}', dtype=torch.float32)
    assert model.config.rotary is None
    assert load_tokenizer(f'modelscope:{ID}')('Hello').input_ids[0] == 1
    folder = resolve_model(f'modelscope:{ID}')
    assert not list(folder.rglob('*.py'))  # code is not even fetched
    assert not any('modeling' in path for path in hub.asked)


def test_a_revision_from_modelscope(hub: Hub) -> None:
    model = load_model(f'modelscope:{ID}', dtype=torch.float32, revision='v1.0.3')
    assert model.config.rotary == {'base': 10000, 'type': 'dynamic'}


def test_what_modelscope_does_not_have(hub: Hub) -> None:
    with pytest.raises(
        ModelError, match=r"'nobody/nothing' cannot be downloaded from ModelScope: .*(?i:not found|404)"
    ) as caught:
        resolve_model('modelscope:nobody/nothing')
    assert '\n' not in str(caught.value)
    with pytest.raises(ModelError, match=r"at revision 'v9' cannot be downloaded from ModelScope"):
        resolve_model(f'modelscope:{ID}', revision='v9')


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'modelscope', None)
    with pytest.raises(ModelError, match=r'needs modelscope: pip install "xtuner\[modelscope\]"'):
        resolve_model(f'modelscope:{ID}')


def test_a_folder_is_taken_before_a_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'internlm').mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model('internlm') == Path('internlm')
