"""Data files: compressed ones, ones that change, and how much of them is read."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import pytest

from tests.dataset.sources.test_readers import ROWS, values, write
from tests.dataset.sources.test_source import values as values_of_source
from xtuner.dataset.sources.readers import read_file
from xtuner.dataset.sources.source import open_sources
from xtuner.errors import DataError

pytestmark = pytest.mark.unit


def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch):
    import os

    os.mkfifo(tmp_path / 'pipe.jsonl')
    (tmp_path / 'broken.jsonl').symlink_to('nowhere')
    (tmp_path / 'loop.jsonl').symlink_to('loop.jsonl')
    monkeypatch.chdir(tmp_path)
    for path, text in (('pipe.jsonl', 'is a named pipe; data is read'), ('/dev/zero', 'is a device; data is read'),
                       ('broken.jsonl', 'is a link to nowhere, which cannot be followed: No such file'),
                       ('loop.jsonl', 'is a link to loop.jsonl, which cannot be followed: '),
                       ('~.jsonl', 'no such file or folder')):  # fmt: skip
        with pytest.raises(DataError, match=text):
            open_sources(path)
    (tmp_path / '~.jsonl').write_text(json.dumps(ROWS[0]))
    assert values_of_source('~.jsonl') == ROWS[:1]


@pytest.mark.parametrize(
    'suffix', ['jsonl', 'json', 'csv', 'jsonl.gz', 'jsonl.bz2', 'jsonl.xz', 'jsonl.zst', 'parquet']
)
def test_all_bytes_of_a_file_are_counted_while_it_is_read(tmp_path: Path, suffix: str) -> None:
    import pyarrow.parquet

    draw = random.Random(0)
    rows = [{'a': str(i), 'b': f'{draw.getrandbits(400):x}'} for i in range(6_000)]
    path = tmp_path / f'data.{suffix}'
    if suffix == 'parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == 'csv':
        path.write_text('a,b\n' + ''.join(f'{row["a"]},{row["b"]}\n' for row in rows))
    else:
        text = json.dumps(rows) if suffix == 'json' else '\n'.join(map(json.dumps, rows)) + '\n'
        codec = {'gz': 'gzip', 'bz2': 'bz2', 'zst': 'zstd'}.get(suffix[-3:].strip('.l'))
        if suffix.endswith('xz'):
            path.write_bytes(lzma.compress(text.encode()))
        else:
            with pyarrow.output_stream(str(path), compression=codec) as file:
                file.write(text.encode())
    (source,) = open_sources(str(path))
    steps: list[int] = []
    assert sum(1 for _ in source.records(steps.append)) == len(rows)
    assert source.unit == 'B' and source.total == path.stat().st_size
    assert len(steps) > 3 and sum(steps) == pytest.approx(source.total, rel=0.01)


def compressed(path, content, suffix):
    import bz2
    import gzip
    import lzma

    import pyarrow

    if suffix == '.zst':
        with pyarrow.output_stream(str(path), compression='zstd') as file:
            file.write(content)
    else:
        pack = {'.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress}[suffix]
        path.write_bytes(pack(content))


@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz', '.zst'])
@pytest.mark.parametrize('form', ['.json', '.jsonl', '.csv', '.tsv'])
def test_a_compressed_file_holds_the_same_records(form, suffix, tmp_path):
    write(tmp_path / f'a{form}', ROWS, form)
    path = tmp_path / f'a{form}{suffix}'
    compressed(path, (tmp_path / f'a{form}').read_bytes(), suffix)
    assert values(path) == values(tmp_path / f'a{form}') == ROWS


@pytest.mark.parametrize('suffix', ['.gz', '.bz2', '.xz', '.zst'])
def test_a_compressed_file_that_is_cut_off_is_an_error(suffix, tmp_path):
    path = tmp_path / f'a.jsonl{suffix}'
    compressed(path, b''.join(b'{"a": %d}\n' % (n * n) for n in range(20000)), suffix)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b'no such thing', b''):
        path.write_bytes(content)
        try:
            found = values(path)
            assert (content, found) == (b'', [])
        except DataError as error:
            assert str(error).startswith(f'{path}: ') and '\n' not in str(error)


def test_text_and_what_is_packed_twice_are_named(tmp_path):
    with pytest.raises(DataError, match=r'a\.txt: plain text is not supported: .* JSON line'):
        list(read_file(tmp_path / 'a.txt'))
    with pytest.raises(DataError, match=r"unknown file format '\.parquet\.gz'"):
        list(read_file(tmp_path / 'a.parquet.gz'))


@pytest.mark.parametrize('form', ['.jsonl', '.json', '.csv', '.parquet'])
def test_a_file_that_changes_while_it_is_read_is_an_error(form, tmp_path):
    path = tmp_path / f'a{form}'
    write(path, ROWS, form)
    records = read_file(path)
    next(records)
    with path.open('ab') as file:
        file.write(b' ' * 100)
    with pytest.raises(DataError, match='changed while being read'):
        list(records)
