"""`xtuner log-dataset`."""

from __future__ import annotations

import pytest

from xtuner.cli.main import main


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
