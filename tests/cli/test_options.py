"""Options that are other names of config keys."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from xtuner.cli.main import main
from xtuner.cli.options import ALIASES, add_config_arguments, read_config
from xtuner.errors import UsageError

pytestmark = pytest.mark.unit

NAME = 'internlm_7b_qlora_oasst1'


def config_of(*words: str, **overrides: Any) -> Any:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    return read_config(parser.parse_args([NAME, *words]), {k.replace('__', '.'): v for k, v in overrides.items()})


def value_at(config: Any, key: str) -> Any:
    section, _, name = key.partition('.')
    found = getattr(config, section)
    return found[name] if isinstance(found, dict) else getattr(found, name)


@pytest.mark.parametrize('name', ALIASES)
def test_an_option_sets_its_key_and_help_names_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    key = ALIASES[name].key
    assert value_at(config_of(), key) != 7
    assert value_at(config_of(name, '7'), key) == 7
    with pytest.raises(SystemExit):
        main(['train', '--help'])
    assert f': {key}' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('name', ALIASES)
def test_one_value_is_not_set_twice(name: str) -> None:
    with pytest.raises(UsageError, match=f'{name} and --cfg-options {ALIASES[name].key}=... set the same value'):
        config_of(name, '7', '--cfg-options', f'{ALIASES[name].key}=7')


def test_epochs_take_the_place_of_steps_and_not_of_both() -> None:
    with pytest.raises(UsageError, match='--epochs and a number of steps'):
        config_of('--epochs', '2', schedule__max_steps=5)
    with pytest.raises(UsageError, match='--epochs and a number of steps'):
        config_of('--epochs', '2', '--cfg-options', 'schedule.max_steps=5')
    schedule = config_of('--epochs', '2.5').schedule
    assert (schedule.max_epochs, schedule.max_steps) == (2.5, None)


def test_a_rank_needs_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['print-config', 'internlm_7b_full_oasst1', '--lora-rank', '8']) == 1
    assert '`adapter` needs a `type`' in capsys.readouterr().err
