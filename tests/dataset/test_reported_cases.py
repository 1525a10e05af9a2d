"""Inputs that users reported as read wrongly, made here, and those kept in `../shared/cases` where they are present."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.check import check_dataset
from xtuner.dataset.encode.conversation_encoder import Encoder
from xtuner.dataset.prepare import encode_source
from xtuner.dataset.sources.source import open_sources
from xtuner.dataset.summary import Summary
from xtuner.dataset.templates.builtin import get_template

PAIR = {'messages': [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]}
CASES = ROOT.parent / 'shared' / 'cases'


@pytest.fixture(params=['made here', 'reported'])
def case(request, tmp_path):
    """Returns the folder of a case: what `files` says, or the one that was kept."""

    def folder(name: str, files: dict[str, bytes]) -> Path:
        if request.param == 'reported':
            if not (CASES / name).is_dir():
                pytest.skip(f'{CASES / name} is absent: reported inputs lie there where they are available')
            return CASES / name
        for file, content in files.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)
        return tmp_path

    return folder


@pytest.fixture
def texts(internlm_like):
    """The trained and untrained text of each conversation of a source, and the summary."""

    def read(source: Path, **options: object) -> tuple[list[str], Summary]:
        config = DatasetConfig(source=str(source), max_length=2**21, **options)
        summary, encoder = Summary(), Encoder(internlm_like, get_template('internlm_chat'))
        [opened] = open_sources(config.source)
        chunks = encode_source(opened, config, encoder=encoder, summary=summary)
        return [internlm_like.decode(sample.input_ids) for chunk in chunks for _, sample in chunk], summary

    return read


def lines(*records: object) -> bytes:
    return b'\n'.join(json.dumps(record).encode() for record in records)


def test_alpaca_system_history(case, texts):
    record = {'instruction': 'Now?', 'input': '', 'output': 'four', 'system': 'Speak pirate.',
              'history': [['One?', 'two'], ['Three?', 'x']]}  # fmt: skip
    folder = case('alpaca_system_history', {'data.jsonl': lines(record)})
    [text], summary = texts(folder / 'data.jsonl')
    assert text == ('<s><|System|>:Speak pirate.\n<|User|>:One?<eoh>\n<|Bot|>:two<eoa>\n<|User|>:Three?<eoh>\n'
                    '<|Bot|>:x<eoa>\n<|User|>:Now?<eoh>\n<|Bot|>:four<eoa>')  # fmt: skip
    assert not summary.unused


def test_big_first_record(case, texts):
    long = {'messages': [{'role': 'user', 'content': 'x' * 1_100_000}, {'role': 'assistant', 'content': 'b'}]}
    folder = case('big_first_record', {'data.json': lines(long, PAIR)})
    found, _ = texts(folder / 'data.json')
    assert len(found) == 2 and len(found[0]) > 10**6


def test_gz_ignored(case, texts):
    files = {'data/a.jsonl': lines(PAIR), 'data/b.jsonl.gz': gzip.compress(lines(PAIR))}
    found, summary = texts(case('gz_ignored', files) / 'data')
    assert len(found) == 2 and not summary.notes


def test_hidden_folder(case, texts):
    files = {'data/train.jsonl': lines(PAIR), 'data/.ipynb_checkpoints/train-checkpoint.jsonl': lines(PAIR)}
    folder = case('hidden_folder', files) / 'data'
    found, summary = texts(folder)
    assert len(found) == 1
    assert summary.notes == [f'{folder}: 1 file not read because it is hidden: .ipynb_checkpoints']


def test_reasoning_dropped(case, texts, internlm_like):
    answer = {'role': 'assistant', 'content': 'b', 'reasoning_content': 'because'}
    folder = case('reasoning_dropped', {'data.jsonl': lines({'messages': [PAIR['messages'][0], answer]})})
    config = DatasetConfig(source=str(folder / 'data.jsonl'))
    summary = check_dataset(config, tokenizer=internlm_like, template=get_template('internlm_chat'))
    [message] = summary.examples['bad']
    assert message.startswith(f'{folder}/data.jsonl:1: `messages[1].reasoning_content` (reasoning) is not supported by '
                              'the template `internlm_chat`')  # fmt: skip
    _, summary = texts(folder / 'data.jsonl', ignore=['reasoning_content'])
    assert summary.ignored == {'reasoning_content': 1}


def test_top_level_system(case, texts):
    folder = case('top_level_system', {'data.jsonl': lines({'system': 'Speak pirate.', **PAIR})})
    [text], _ = texts(folder / 'data.jsonl')
    assert text.startswith('<s><|System|>:Speak pirate.\n<|User|>:a')


def test_train_test_folder(case, texts, tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR]), tmp_path / 'made.parquet')
    content = (tmp_path / 'made.parquet').read_bytes()
    (tmp_path / 'made.parquet').unlink()
    parts = {part: f'data/data/{part}-00000-of-00001.parquet' for part in ('train', 'test')}
    folder = case('train_test_folder', dict.fromkeys(parts.values(), content)) / 'data'
    found, summary = texts(folder)
    assert len(found) == 1
    [note] = summary.notes
    assert note.startswith(f'{folder}: 1 file not trained because it is a test or validation split; ')
    assert note.endswith('data/test-00000-of-00001.parquet')
