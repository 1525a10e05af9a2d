"""What a run begins with, looked at before anything is prepared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.convert.adapters import make_base
from xtuner.adapters.attach import attach_adapter
from xtuner.engine.checkpoint.resume import ResumeOptions, check_start, check_weights_folder, find_checkpoint
from xtuner.errors import CheckpointError, ConfigError
from xtuner.model.loading import load_model


def test_weights_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'--start-from .*checkpoint-00000001: no such folder'):
        find_checkpoint(tmp_path / 'work', ResumeOptions(weights=tmp_path / 'none' / 'checkpoint-00000001'), rank=0)
    assert find_checkpoint(tmp_path / 'work', ResumeOptions(weights=tmp_path), rank=0) is None


def test_a_classical_checkpoint_is_told_what_to_do_with_it(tmp_path: Path) -> None:
    (tmp_path / 'iter_600.pth').touch()
    with pytest.raises(CheckpointError, match=r'iter_600.pth: a checkpoint of classical xtuner .* pth_to_hf'):
        check_start(tmp_path / 'run', ResumeOptions(resume=str(tmp_path / 'iter_600.pth')))


def test_how_a_prompt_began_is_not_compared(tmp_path: Path) -> None:
    """A saved prompt is read without it."""
    base = make_base(tmp_path / 'base')
    sections = [
        {'type': 'peft:PromptTuningConfig', 'num_virtual_tokens': tokens, 'task_type': 'CAUSAL_LM',
         'prompt_tuning_init': 'SAMPLE_VOCAB'} for tokens in (3, 4)
    ]  # fmt: skip
    attach_adapter(load_model(base, dtype=torch.float32), sections[0]).save_pretrained(tmp_path / 'prompt')
    configs: list[Any] = [SimpleNamespace(adapter=section) for section in sections]
    check_weights_folder(configs[0], tmp_path / 'prompt', 'fingerprint')
    with pytest.raises(ConfigError, match=r'`adapter.num_virtual_tokens` is 4, but .* was trained with 3'):
        check_weights_folder(configs[1], tmp_path / 'prompt', 'fingerprint')
