"""JSON files of others: each that cannot be read is one line that names it. Files that are replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xtuner.errors import ModelError
from xtuner.utils import files
from xtuner.utils.files import expanded, read_object, write_atomically

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'Expecting value'),
        (b'[]', 'expected a JSON object'),
        (b'{"a": 1', 'Expecting'),
        (b'\xff{}', "can't decode byte"),
        (b'[' * 200_000, 'nested deeper than 64 levels'),
        (b'{"a": ' * 65 + b'1' + b'}' * 65, 'nested deeper than 64 levels'),
        (b'{"x": 1, "x": 2}', "the key 'x' occurs twice"),
        (b'{"y": {"x": 1, "x": 2}}', "the key 'x' occurs twice"),
        (b'{"x": ' + b'9' * 5000 + b'}', 'limit'),
    ],
)
def test_what_is_no_sound_object_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (path := tmp_path / 'config.json').write_bytes(content)
    with pytest.raises(ModelError, match=reason) as caught:
        read_object(path, ModelError)
    assert str(caught.value).startswith(f'{path} cannot be read: ')
    assert '\n' not in str(caught.value)


def test_a_sound_object_is_read(tmp_path: Path) -> None:
    (path := tmp_path / 'config.json').write_text('{"a": ' * 63 + '{"x": 1, "x": 1, "y": Infinity}' + '}' * 63)
    content = read_object(path, ModelError)
    for _ in range(63):
        content = content['a']
    assert content == {'x': 1, 'y': float('inf')}


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    (tmp_path / 'zero').symlink_to('/dev/zero')
    for name, reason in (('pipe', 'named pipe'), ('loop', 'symbolic links'), ('zero', 'a device'), ('.', 'a folder'),
                         ('none', 'No such file'), ('a\x00b', 'null byte')):  # fmt: skip
        with pytest.raises(ModelError, match=reason):
            read_object(tmp_path / name, ModelError)


def test_a_file_too_large_is_not_parsed(tmp_path: Path) -> None:
    (path := tmp_path / 'config.json').write_text('{"a": "' + 'x' * 2**21 + '"}')
    with pytest.raises(ModelError, match='larger than 1 MiB'):
        read_object(path, ModelError, max_bytes=2**20)
    assert read_object(path, ModelError)


def test_a_home_of_nobody_is_a_name() -> None:
    assert expanded('~.jsonl') == Path('~.jsonl')
    assert expanded('~/x') == Path.home() / 'x'


@pytest.mark.parametrize('durable', [False, True])
def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'about.json'
    write_atomically(path, '你好\r\n', durable=durable)
    assert path.read_bytes() == '你好\r\n'.encode()
    monkeypatch.setattr(files.os, 'replace', lambda a, b: (_ for _ in ()).throw(OSError(28, 'No space left')))
    with pytest.raises(OSError, match='No space left'):
        write_atomically(path, b'other', durable=durable)
    assert path.read_bytes() == '你好\r\n'.encode()


def test_a_durable_write_flushes_the_file_then_names_it_then_flushes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    replace = os.replace
    monkeypatch.setattr(files, 'flush', lambda path: order.append(f'flush {path.name}'))
    monkeypatch.setattr(files.os, 'replace', lambda a, b: (order.append(f'name {b.name}'), replace(a, b)))
    write_atomically(tmp_path / 'plain', '')
    assert order == ['name plain']
    write_atomically(tmp_path / 'last', '', durable=True)
    assert order[1:] == ['flush last.partial', 'name last', f'flush {tmp_path.name}']
