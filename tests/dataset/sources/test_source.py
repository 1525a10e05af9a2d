from __future__ import annotations

import json
import types

import pytest

from xtuner.dataset.sources.source import hash_file, open_sources
from xtuner.errors import ConfigError, DataError

ROWS = [{'input': str(n), 'output': 'x'} for n in range(3)]


def values(spec):
    return [record.value for source in open_sources(spec) for record in source.records()]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, ROWS[:2])))
    (tmp_path / 'sub' / 'b.json').write_text(json.dumps(ROWS[2:]))
    (tmp_path / 'README.md').write_text('not data')
    return tmp_path


def test_a_file_a_folder_and_a_list_of_them(folder):
    assert values(str(folder / 'a.jsonl')) == ROWS[:2]
    assert values(folder) == ROWS
    assert values([str(folder / 'sub'), {'path': str(folder / 'a.jsonl')}]) == [ROWS[2], *ROWS[:2]]


def test_a_source_can_be_read_twice(folder):
    [source] = open_sources(str(folder))
    assert len(list(source.records())) == len(list(source.records())) == 3


def test_a_data_set_saved_or_loaded_by_the_datasets_library(tmp_path):
    datasets = pytest.importorskip('datasets')
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / 'saved')
    assert values(str(tmp_path / 'saved')) == values(dataset) == ROWS
    assert [r.origin for r in open_sources(dataset)[0].records()] == [f'Dataset[{n}]' for n in range(3)]
    datasets.DatasetDict({'train': dataset}).save_to_disk(tmp_path / 'dict')
    assert values(str(tmp_path / 'dict')) == ROWS
    datasets.DatasetDict({'test': dataset}).save_to_disk(tmp_path / 'test_only')
    with pytest.raises(DataError, match="no split 'train'; available: test"):
        open_sources(str(tmp_path / 'test_only'))


def test_the_classical_form_of_a_source(folder, tmp_path):
    datasets = pytest.importorskip('datasets')
    spec = {'type': datasets.load_dataset, 'path': 'json', 'data_files': str(folder / 'a.jsonl'),
            'cache_dir': str(tmp_path / 'hf')}  # fmt: skip
    assert values(spec) == ROWS[:2]


def test_fingerprints_follow_the_content(folder):
    file = folder / 'a.jsonl'
    before = open_sources(str(file))[0].fingerprint()
    assert before == open_sources(str(file))[0].fingerprint()
    assert open_sources(ROWS[:0] or [str(file)])[0].fingerprint() == before
    file.write_text(file.read_text().replace('"0"', '"9"'))
    assert open_sources(str(file))[0].fingerprint() != before
    assert hash_file(file) != hash_file(folder / 'sub' / 'b.json')


@pytest.mark.parametrize(
    ('spec', 'error', 'text'),
    [
        ('a.jsnl/../data.jsonl', DataError, 'no such file or folder'),
        ('./nothing', DataError, 'no such file or folder'),
        ('a/b/c', DataError, 'no such file or folder'),
        ([], ConfigError, '`dataset.source` is an empty list'),
        (3, ConfigError, '`dataset.source` must be a file, a folder, a hub id, a dict or a list of these, got 3'),
        ({'file': 'x'}, ConfigError, '`dataset.source` must be a dict with `path` and optionally name, split'),
        ({'path': 'x', 'wieght': 2}, ConfigError, "did you mean 'weight'"),
        ({'path': 'x', 'weight': 0}, ConfigError, '`weight` must be a number above 0, got 0'),
        ({'path': 'x', 'weight': float('nan')}, ConfigError, '`weight` must be a number above 0, got nan'),
        ({'path': 'x', 'weight': True}, ConfigError, '`weight` must be a number above 0, got True'),
    ],
)
def test_what_is_no_source_is_said(spec, error, text):
    with pytest.raises(error, match=text):
        open_sources(spec)


def test_a_misspelt_file_names_its_neighbour(folder):
    with pytest.raises(DataError, match=r"b\.jsonl: no such file or folder; did you mean '.*a\.jsonl'"):
        open_sources(str(folder / 'b.jsonl'))
    (folder / 'empty').mkdir()
    with pytest.raises(DataError, match=r'the folder contains no data file; supported: .jsonl'):
        open_sources(str(folder / 'empty'))


def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch):
    pytest.importorskip('datasets')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(
        DataError, match='timdettmers/no-such-set: neither a local file or folder nor a data set'
    ) as caught:
        open_sources('timdettmers/no-such-set')
    assert '\n' not in str(caught.value)


def test_modelscope_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'modelscope.msdatasets', None)
    with pytest.raises(ConfigError, match=r'needs the package modelscope: pip install "xtuner\[modelscope\]"'):
        open_sources('modelscope:owner/name')


def test_a_hub_id_is_loaded_with_its_options(monkeypatch):
    datasets = pytest.importorskip('datasets')
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    assert (
        values('owner/name') == values({'path': 'owner/name', 'split': 'test', 'revision': 'r', 'name': 'sub'}) == ROWS
    )
    assert asked == [
        ('owner/name', {'split': 'train'}),
        ('owner/name', {'split': 'test', 'name': 'sub', 'revision': 'r'}),
    ]
    [stream] = open_sources({'path': 'owner/name', 'streaming': True})
    assert [record.value for record in stream.records()] == ROWS and stream.fingerprint().startswith('owner/name:train')


def test_modelscope_is_loaded_with_its_options(monkeypatch):
    class Loaded:
        def to_hf_dataset(self):
            return ROWS

    class MsDataset:
        @staticmethod
        def load(path, **options):
            assert (path, options) == ('owner/name', {'split': 'test', 'subset_name': 'sub', 'version': 'v'})
            return Loaded()

    sys_modules = __import__('sys').modules
    monkeypatch.setitem(sys_modules, 'modelscope', types.ModuleType('modelscope'))
    monkeypatch.setitem(sys_modules, 'modelscope.msdatasets', types.SimpleNamespace(MsDataset=MsDataset))
    assert values({'path': 'modelscope:owner/name', 'split': 'test', 'name': 'sub', 'revision': 'v'}) == ROWS


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


def test_the_splits_of_a_saved_data_set_that_are_not_trained_are_named(tmp_path):
    datasets = pytest.importorskip('datasets')
    parts = {name: datasets.Dataset.from_list(ROWS) for name in ('train', 'test')}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / 'saved')
    [source] = open_sources(str(tmp_path / 'saved'))
    assert source.notes == (f'{tmp_path}/saved: training on the split train of the saved data set, not on test',)
    (tmp_path / 'saved' / 'train' / 'dataset_info.json').write_text('{')
    with pytest.raises(DataError, match='the saved data set cannot be read: ') as caught:
        open_sources(str(tmp_path / 'saved'))
    assert '\n' not in str(caught.value)


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
    assert values('~.jsonl') == ROWS[:1]
