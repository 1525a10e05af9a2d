"""DeepSpeed's JSON configs: shipped ones, and a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xtuner.config.deepspeed import read_deepspeed_config, shipped_deepspeed_configs, stage_of
from xtuner.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize('name', shipped_deepspeed_configs())
def test_what_the_run_sets_is_taken_out_of_shipped_configs(name: str) -> None:
    content = read_deepspeed_config(name)
    assert not {'train_batch_size', 'optimizer', 'fp16', 'bf16', 'gradient_clipping'} & set(content)
    assert stage_of(name) == f'deepspeed_zero{content["zero_optimization"]["stage"]}'


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / 'mine.json'
    path.write_text(json.dumps({'zero_optimization': {'stage': 3}, 'train_batch_size': 'auto', 'prescale': True}))
    assert read_deepspeed_config(str(path)) == {'zero_optimization': {'stage': 3}, 'prescale': True}
    assert (stage_of(str(path)), stage_of('ddp')) == ('deepspeed_zero3', 'ddp')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"zero_optimization": {"stage": 0}}', 'is 0, must be 1, 2 or 3; without ZeRO, use ddp'),
        ('{}', 'not a DeepSpeed config with `zero_optimization.stage`'),
        ('[]', 'not a DeepSpeed config'),
        ('{', 'not a DeepSpeed config'),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (path := tmp_path / 'mine.json').write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_deepspeed_config(str(path))
    assert str(caught.value).startswith(str(path))


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'deepspeed_zero4', which is neither a strategy nor a file; did you mean"):
        read_deepspeed_config('deepspeed_zero4')
