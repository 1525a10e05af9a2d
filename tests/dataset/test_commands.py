"""The commands about data, run as a user runs them, on a config and a model folder with nothing but a tokenizer."""

from __future__ import annotations

import json
import re

import pytest

from xtuner.cli.main import main

RECORDS = [{'question': f'Who is {n}?', 'answer': f'I am {n}.'} for n in range(20)]


@pytest.fixture
def config(tmp_path, internlm_like, monkeypatch):
    """Writes a config, its data and its model folder; returns the words `CONFIG` stands for."""
    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path / 'cache'))
    internlm_like.save_pretrained(tmp_path / 'model')
    (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, RECORDS)))
    (tmp_path / 'config.py').write_text(
        f"model = dict(path={str(tmp_path / 'model')!r}, template='internlm_chat')\n"
        f'dataset = dict(source={str(tmp_path / "data.jsonl")!r}, max_length=64, val_ratio=0.2)\n'
        "optimizer = dict(type='torch.optim.AdamW')\n"
    )
    return str(tmp_path / 'config.py')


def test_preprocess_prints_the_folder_that_training_takes(config, tmp_path, capsys):
    assert main(['preprocess', config]) == 0
    out, err = capsys.readouterr()
    [folder] = out.splitlines()
    assert folder.startswith(str(tmp_path / 'cache' / 'datasets'))
    assert re.search(r'\d\d:\d\d:\d\d  data: prepared in', err)
    assert main(['preprocess', config]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize('part', ['train', 'val'])
def test_log_dataset_shows_samples_and_lengths(config, part, capsys):
    assert main(['log-dataset', config, '--num', '2', '--part', part]) == 0
    out = capsys.readouterr().out
    assert out.count('--- conversation') == 2
    assert '<s><|User|>:Who is ' in out and '<|Bot|>:«I am ' in out and '.<eoa>»' in out
    assert f'--- {16 if part == "train" else 4} conversations in' in out and '█' in out
    assert '\x1b[' not in out


def test_log_dataset_in_colours(config, capsys):
    assert main(['log-dataset', config, '--color', 'always']) == 0
    assert '\x1b[32mI am ' in capsys.readouterr().out
    assert main(['log-dataset', config, '--part', 'val', '--cfg-options', 'dataset.val_ratio=0']) == 1
    assert 'has no validation data' in capsys.readouterr().err


def test_check_custom_dataset_says_what_is_wrong_where(config, tmp_path, capsys):
    assert main(['check-custom-dataset', config]) == 0
    assert 'all records are usable' in capsys.readouterr().out
    (tmp_path / 'none.csv').write_text('question,answer\n')
    assert main(['check-custom-dataset', config, '--data', str(tmp_path / 'none.csv')]) == 1
    assert "none.csv' contains no conversation" in capsys.readouterr().err
    bad = tmp_path / 'bad.jsonl'
    bad.write_bytes(
        b'{"question": "q", "answer": "a"}\n{"question": "q"}\n{"question": \n{"question": "q", "answer": ""}'
    )
    assert main(['check-custom-dataset', config, '--data', str(bad)]) == 1
    out, err = capsys.readouterr()
    assert f'bad: {bad}:2: `gsm8k_map_fn` needs the column answer; found question; the nearest is' in out
    assert f'bad: {bad}:3: not JSON: ' in out and f'bad: {bad}:4: `conversation[0].output` is empty' in out
    assert err.endswith('xtuner: error: 3 of 4 records are invalid, listed above by file and line\n')


def test_check_custom_dataset_counts_what_is_too_long(config, tmp_path, capsys):
    long = {'question': 'long ' * 100, 'answer': 'a'}
    (tmp_path / 'long.jsonl').write_text(json.dumps(long))
    command = ['check-custom-dataset', config, '--data', str(tmp_path / 'long.jsonl'), '--cfg-options']
    assert main([*command, 'dataset.on_long=error']) == 1
    out, err = capsys.readouterr()
    assert 'too long: ' in out and 'xtuner: error: 1 of 1 record is invalid' in err
    assert main([*command, 'dataset.on_long=drop']) == 1
    assert 'xtuner: error: 1 of 1 conversations would be dropped' in capsys.readouterr().err
    (tmp_path / 'long.jsonl').write_text('\n'.join(map(json.dumps, [*RECORDS, long])))
    assert main([*command, 'dataset.on_long=drop']) == 0
    assert '1 conversation would be dropped' in capsys.readouterr().out


def test_check_custom_dataset_of_an_unknown_format_names_the_nearest(config, tmp_path, capsys):
    (tmp_path / 'odd.jsonl').write_text('{"instruction": "i", "reply": "r"}')
    assert main(['check-custom-dataset', config, '--data', str(tmp_path / 'odd.jsonl')]) == 1
    err = capsys.readouterr().err
    assert 'odd.jsonl:1: no known format has the columns instruction, reply; the nearest is `' in err
    assert len(err.strip().splitlines()) == 1


def test_list_dataset_format_lists_all(capsys):
    assert main(['list-dataset-format']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert any(line.startswith('alpaca ') and 'instruction, output' in line for line in lines)
