"""Checkpoint files of classical xtuner that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.test_pth_to_hf import base, config  # noqa: F401
from xtuner.cli.main import main


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('bomb', 'was rejected without running any of it'),
        ('cut', 'is damaged or truncated'),
        ('visual', 'belongs to a vision-language model'),
        ('rank', 'rank 4 in the config but 2 in the checkpoint'),
        ('empty', 'are in other files (ZeRO 3)'),
        ('nothing', 'no such file'),
        ('folder', 'no mp_rank_00_model_states.pt'),
        ('zero 3', 'zero_to_fp32.py'),
    ],
)
def test_what_cannot_be_read_is_one_line(
    content: str,
    message: str,
    base: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / 'iter_500.pth'
    lora = {f'llm.base_model.model.model.layers.0.self_attn.q_proj.lora_{a}.weight': torch.ones(2, 2) for a in 'AB'}
    contents: dict[str, Any] = {
        'bomb': {'state_dict': lora, 'meta': Bomb(tmp_path / 'exploded')},
        'cut': {'state_dict': lora},
        'visual': {'state_dict': {'projector.model.0.weight': torch.ones(2)}},
        'rank': {'state_dict': lora},
        'empty': {'module': {'llm.model.norm.weight': torch.ones(0)}},
    }
    if content in contents:
        torch.save(contents[content], path)
    if content == 'cut':
        path.write_bytes(path.read_bytes()[:-200])
    if content in ('folder', 'zero 3'):
        path.mkdir()
    if content == 'zero 3':
        for name in ('mp_rank_00_model_states.pt', 'zero_pp_rank_0_mp_rank_00_model_states.pt'):
            torch.save({}, path / name)
    assert main(['convert', 'pth_to_hf', config(tmp_path, base), str(path), str(tmp_path / 'out')]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert 'unexpected' not in error
    assert not (tmp_path / 'exploded').exists()
    assert not (tmp_path / 'out').exists()


def test_a_file_that_is_no_checkpoint_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / 'data.jsonl'
    data.write_text('{"messages": []}\n')
    assert main(['convert', 'pth_to_hf', 'internlm_7b_qlora_oasst1', str(data), str(tmp_path / 'out')]) == 1
    assert 'data.jsonl is not a checkpoint: not in a format of torch.save' in capsys.readouterr().err
