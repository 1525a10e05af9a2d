"""An adapter that names a prompt template nobody knows is refused early, naming file and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.adapters.attach import Provenance, check_template
from xtuner.errors import CheckpointError


@pytest.mark.parametrize('name', ['this.s', 'os.system', '', 'internlm_chatt'])
def test_an_unknown_template_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf'xtuner\.json: `template`: .*{name!r}.* is not a prompt template'):
        check_template(Provenance('base', 'print', name, 'fp32'), tmp_path)


@pytest.mark.parametrize('name', ['internlm_chat', 'from_tokenizer'])
def test_a_known_template_passes(name: str, tmp_path: Path) -> None:
    check_template(Provenance('base', 'print', name, 'fp32'), tmp_path)
    check_template(None, tmp_path)
