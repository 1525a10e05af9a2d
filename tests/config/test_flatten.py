"""A config as one flat file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_load import FLAGSHIP, write
from xtuner.config.flatten import flatten
from xtuner.config.load import load_config

pytestmark = pytest.mark.unit


@pytest.mark.parametrize('name', [FLAGSHIP, 'internlm_7b_full_oasst1', 'internlm_chat_7b_lora_oasst1'])
def test_a_flat_copy_is_the_same_config(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    flat = flatten(config, title='flat')
    assert load_config(write(tmp_path, flat)) == config
    assert '# peak learning rate' in flat
    assert 'read_base' not in flat
