from __future__ import annotations

import json
import types

import pytest

from xtuner.dataset.sources.source import hash_file, open_sources, with_progress
from xtuner.errors import ConfigError, DataError

pytestmark = pytest.mark.unit

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


@pytest.mark.torch
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


def test_rows_of_a_loaded_data_set_are_counted_and_progress_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    import datasets

    caplog.set_level('INFO', 'xtuner')
    (source,) = open_sources([datasets.Dataset.from_list(ROWS)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('xtuner.utils.progress._EVERY_S', 0)
        with with_progress(source) as read:
            assert [record.value for record in read.records()] == ROWS
    assert source.total == len(ROWS) and source.unit == 'records'
    assert caplog.messages[0].startswith(f'reading {source.name}: ')
