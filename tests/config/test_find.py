"""Names of configs, classical ones too, and how a flat config reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.cli.main import main
from xtuner.config.find import find_config, list_configs
from xtuner.config.flatten import flatten
from xtuner.config.load import load_config
from xtuner.errors import ConfigError

pytestmark = pytest.mark.unit


def test_a_classical_name_is_todays_with_its_epochs(tmp_path: Path) -> None:
    assert find_config('internlm_chat_7b_qlora_oasst1_e3').stem == 'internlm_chat_7b_qlora_oasst1'
    assert 'internlm_7b_qlora_openorca' in list_configs('7b_qlora_openorca_e1')
    assert load_config('internlm_7b_qlora_openorca_e1').schedule.max_epochs == 1
    assert load_config('internlm_7b_qlora_openorca_e1', {'schedule.max_epochs': 2}).schedule.max_epochs == 2
    assert load_config('internlm_7b_qlora_openorca').schedule.max_epochs == 3
    own = tmp_path / 'mine_e7.py'  # a file's own name says nothing
    own.write_text(flatten(load_config('internlm_7b_qlora_openorca'), title='mine'), encoding='utf-8')
    assert load_config(str(own)).schedule.max_epochs == 3
    with pytest.raises(ConfigError, match='no config'):
        find_config('internlm_7b_qlora_oasst1_e')


def test_a_copy_is_called_as_it_was_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['copy-cfg', 'internlm_7b_qlora_openorca_e1', str(tmp_path)]) == 0
    copy = tmp_path / 'internlm_7b_qlora_openorca_e1_copy.py'
    assert capsys.readouterr().out.strip() == str(copy)
    assert load_config(str(copy)).schedule.max_epochs == 1


@pytest.mark.parametrize('name', list_configs())
def test_no_line_of_a_flat_config_is_longer_than_a_window(name: str) -> None:
    lines = flatten(load_config(name), title=name).splitlines()
    assert max(map(len, lines)) <= 120
    assert not [line for line in lines if 'truncate_left' in line and line.count('truncate_left') > 1]
