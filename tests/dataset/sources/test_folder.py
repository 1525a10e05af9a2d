"""Folders of data: what is read, and what is named as left out."""

from __future__ import annotations

import json

import pytest

from tests.dataset.sources.test_source import ROWS
from xtuner.dataset.sources.source import open_sources

pytestmark = pytest.mark.unit


def test_hidden_held_out_and_other_files_of_a_folder_are_named(tmp_path):
    files = [
        'a.jsonl',
        'test.jsonl',
        'sub/validation-0.jsonl',
        'dev/x.jsonl',
        'my_eval.jsonl.gz',
        'train_eval.jsonl',
        'contest.jsonl',
        'device.jsonl',
        'b.jsonl',
        'b.jsonl.gz',
        'notes.txt',
        '.git/x.jsonl',
        '.a.jsonl',
    ]
    for number, file in enumerate(files):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps({'n': number}))
    [source] = open_sources(tmp_path)
    read = {record.origin.removeprefix(f'{tmp_path}/').removesuffix(':1') for record in source.records()}
    assert read == {'a.jsonl', 'b.jsonl', 'train_eval.jsonl', 'contest.jsonl', 'device.jsonl'}
    assert [note.removeprefix(f'{tmp_path}: ') for note in source.notes] == [
        '4 files not trained because they are a test or validation split; name them as a source to train on them: '
        'dev/x.jsonl, my_eval.jsonl.gz, sub/validation-0.jsonl, test.jsonl',
        '1 file not read because it is also there uncompressed: b.jsonl.gz',
        '1 file not read because it is not in a supported format: notes.txt',
        '2 files not read because they are hidden: .a.jsonl, .git',
    ]


def test_a_folder_of_nothing_but_a_test_split_is_read_with_a_note(tmp_path):
    (tmp_path / 'test.jsonl').write_text(json.dumps(ROWS[0]))
    [source] = open_sources(tmp_path)
    assert [record.value for record in source.records()] == ROWS[:1]
    assert source.notes == (
        f'{tmp_path}: 1 file used although it is a test or validation split, since the folder contains nothing else: '
        'test.jsonl',
    )
