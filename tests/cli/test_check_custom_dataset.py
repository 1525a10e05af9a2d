"""The commands about data, run as a user runs them, on a config and a model folder with nothing but a tokenizer."""

from __future__ import annotations

import json

from tests.cli.conftest import RECORDS
from xtuner.cli.main import main


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
