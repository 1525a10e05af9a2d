"""Names of optimizers and adapters without a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.config.flatten import flatten
from xtuner.config.load import load_config
from xtuner.config.short_types import SHORT_TYPES
from xtuner.errors import ConfigError
from xtuner.registry import resolve

pytestmark = pytest.mark.unit

NAME = 'internlm_7b_qlora_oasst1'


@pytest.mark.torch
@pytest.mark.parametrize('where', SHORT_TYPES)
def test_every_short_name_is_a_class_of_its_package(where: str) -> None:
    for name, target in SHORT_TYPES[where].items():
        assert resolve(target).__name__ == name


@pytest.mark.torch
def test_all_of_torchs_optimizers_are_short_names() -> None:
    import torch

    classes = (getattr(torch.optim, name) for name in torch.optim.__all__)
    names = {c.__name__ for c in classes if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert {n for n, target in SHORT_TYPES['optimizer'].items() if target.startswith('torch.')} == names - {'Optimizer'}


@pytest.mark.parametrize(
    ('key', 'name', 'target'),
    [
        ('optimizer', 'AdamW', 'torch.optim:AdamW'),  # bitsandbytes has one too
        ('optimizer', 'PagedAdamW8bit', 'bitsandbytes.optim:PagedAdamW8bit'),
        ('optimizer', 'torch.optim:SGD', 'torch.optim:SGD'),
        ('adapter', 'LoraConfig', 'peft:LoraConfig'),
    ],
)
def test_a_short_name_is_kept_in_full(key: str, name: str, target: str, tmp_path: Path) -> None:
    config = load_config(NAME, {f'{key}.type': name})
    assert getattr(config, key)['type'] == target
    (tmp_path / 'flat.py').write_text(flatten(config, title='flat'), encoding='utf-8')
    assert load_config(str(tmp_path / 'flat.py')) == config  # what a run keeps, and resumes with


def test_a_misspelt_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown `optimizer.type` 'AdamWW'; did you mean 'AdamW'"):
        load_config(NAME, {'optimizer.type': 'AdamWW'})
