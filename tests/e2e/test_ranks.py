"""Two processes over gloo do what one does with twice the batch, and a failure of one is seen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from xtuner.cli.main import main


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run([sys.executable, '-m', 'xtuner.cli.main', *words], capture_output=True, text=True,
                          check=False, env=os.environ | {'OMP_NUM_THREADS': '1'} | environment)  # fmt: skip


def words_for(model: Path, data: Path, work_dir: Path, accumulate: int) -> list[str]:
    return ['train', 'internlm_7b_qlora_oasst1', '--model', str(model), '--data', str(data),
            '--work-dir', str(work_dir),
            '--max-steps', '3', '--cfg-options', 'dataset.max_length=32', 'adapter.r=4', 'adapter.lora_dropout=0',
            f'schedule.accumulative_counts={accumulate}', 'samples.prompts=[]', 'optimizer.lr=0.01',
            'log.trackers=[]']  # fmt: skip


def metrics(work_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (work_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()]


def test_two_ranks_train_as_one(tiny_internlm: Path, conversations: Path, tmp_path: Path) -> None:
    assert main(words_for(tiny_internlm, conversations, tmp_path / 'one', 4)) == 0
    words = words_for(tiny_internlm, conversations, tmp_path / 'two', 2)
    together = run([*words, '--nproc-per-node', '2'])
    assert together.returncode == 0, together.stderr
    assert together.stdout == f'{tmp_path / "two" / "checkpoint-00000003"}\n'
    for one, two in zip(metrics(tmp_path / 'one'), metrics(tmp_path / 'two'), strict=True):
        assert two['num_targets'] == one['num_targets']
        assert two['loss'] == pytest.approx(one['loss'], rel=1e-5)
        assert two['grad_norm'] == pytest.approx(one['grad_norm'], rel=1e-4)
    weights = [load_file(tmp_path / n / 'checkpoint-00000003' / 'adapter_model.safetensors') for n in ('one', 'two')]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        # AdamW divides by the gradient's own size: where that is near zero, rounding shows
        assert (weights[1][name] - tensor).abs().max() < 2e-3 * tensor.abs().max(), name


def test_a_failure_on_the_ranks_is_the_command_s_own(tiny_internlm: Path, tmp_path: Path) -> None:
    words = words_for(tiny_internlm, tmp_path / 'nothing.jsonl', tmp_path / 'run', 2)
    result = run(words, NPROC_PER_NODE='2')
    assert result.returncode == 1
    assert 'nothing.jsonl' in result.stderr


def test_a_launcher_that_is_not_there_is_said(
    tiny_internlm: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words_for(tiny_internlm, conversations, tmp_path / 'run', 2), '--launcher', 'pytorch']) == 2
    assert 'start with torchrun' in capsys.readouterr().err
