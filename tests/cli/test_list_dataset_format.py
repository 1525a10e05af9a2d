"""`xtuner list-dataset-format`."""

from __future__ import annotations

from xtuner.cli.main import main


def test_list_dataset_format_lists_all(capsys):
    assert main(['list-dataset-format']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(line.split()[0] for line in lines)
    assert any(line.startswith('alpaca ') and 'instruction, output' in line for line in lines)
