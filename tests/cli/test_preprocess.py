"""`xtuner preprocess`."""

from __future__ import annotations

import re

from xtuner.cli.main import main


def test_preprocess_prints_the_folder_that_training_takes(config, tmp_path, capsys):
    assert main(['preprocess', config]) == 0
    out, err = capsys.readouterr()
    [folder] = out.splitlines()
    assert folder.startswith(str(tmp_path / 'cache' / 'datasets'))
    assert re.search(r'\d\d:\d\d:\d\d  data: prepared in', err)
    assert main(['preprocess', config]) == 0
    assert capsys.readouterr().out == out
