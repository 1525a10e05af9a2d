"""Names that come from files are looked up among registered names; a user's own config may name code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ConfigError
from xtuner.registry import BUILDER, TEMPLATES, registered, resolve

WORDS_OF_CODE = ['canary_of_a_stranger.x', 'canary_of_a_stranger', 'os.system', 'this.s', '../x', '.', '', 'x' * 10**5]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is written when the module `canary_of_a_stranger` is imported."""
    (tmp_path / 'canary_of_a_stranger.py').write_text(f'open({str(tmp_path / "touched")!r}, "w")\n')
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / 'touched'
    sys.modules.pop('canary_of_a_stranger', None)


@pytest.mark.parametrize('name', [*WORDS_OF_CODE, None, 3, [], {}])
def test_nothing_is_imported_for_a_name_from_a_file(name: object, canary: Path) -> None:
    assert registered(TEMPLATES, name) is None
    with pytest.raises(ConfigError, match='is not a prompt template') as caught:
        get_template(name)
    assert len(str(caught.value)) < 1000
    assert not canary.exists()


def test_registered_names_are_found() -> None:
    assert get_template('internlm2_chat') is registered(TEMPLATES, 'internlm2_chat') is not None


def test_a_config_may_name_code(canary: Path) -> None:
    assert resolve('torch.optim.AdamW') is resolve('torch.optim:AdamW') is torch.optim.AdamW
    with pytest.raises(ConfigError, match='no registered type'):
        resolve('canary_of_a_stranger.x')
    assert canary.exists()  # that is: the canary works


@pytest.mark.parametrize('name', ['no.such.module', '../x', '.', '', 'AdamWW'])
def test_a_type_that_is_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match='type'):
        resolve(name)
    assert registered(BUILDER, name) is None
