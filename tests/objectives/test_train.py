"""A user's objective through `xtuner train`: trains, is logged, resumes exactly, and is refused where it changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine.checkpoint.test_run_manifest import Train, _count_again, train  # noqa: F401
from tests.faults.lives import metrics, newest, result

LOSS = """
from xtuner.objectives import Objective


def smoothed(rows, smoothing=0.1):
    loss = -(1 - smoothing) * rows.log_prob - smoothing / rows.vocabulary * rows.sum_log_probs
    return loss.sum(), {'entropy': rows.entropy.sum()}


class Centred(Objective):
    def statistics(self, rows):
        return {'sum': rows.log_prob.sum(), 'count': rows.log_prob.new_tensor(rows.count)}

    def loss(self, rows, statistics):
        mean = statistics['sum'] / statistics['count']
        return (rows.log_prob - mean.float()).square().sum() - rows.log_prob.sum(), {}


def broken(rows):
    return rows.log_prob / 0 + undefined
"""
SMOOTHED = '{"type": "FILE:smoothed", "needs": ["log_prob", "sum_log_probs", "entropy"], "no_grad": ["entropy"]}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / 'losses.py'
    path.write_text(LOSS, encoding='utf-8')
    return path


@pytest.mark.parametrize('section', [SMOOTHED, 'FILE:Centred'])
def test_a_run_with_ones_own_objective_resumes_exactly(
    section: str,
    file: Path,
    train: Train,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = f'objective={section.replace("FILE", str(file))}'
    assert train('whole', option) == 0
    lines = [line for line in metrics(tmp_path / 'whole') if 'loss' in line]
    assert lines[-1]['loss'] < lines[0]['loss']
    assert 'Centred' in section or all(0 < line['entropy'] < 7 for line in map(_raw(tmp_path / 'whole').get, (1, 4)))
    card = (newest(tmp_path / 'whole') / 'README.md').read_text(encoding='utf-8')
    assert f'| objective | {"Centred" if "Centred" in section else "smoothed"} |' in card
    assert str(file) not in card
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000004')
    assert train('run', option) == 0
    assert result(tmp_path / 'run') == result(tmp_path / 'whole')

    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000004')
    capsys.readouterr()
    assert train('run') == 1
    assert 'cannot resume exactly, `objective' in capsys.readouterr().err.splitlines()[-1]
    file.write_text(LOSS + '# edited\n', encoding='utf-8')
    assert train('run', option) == 1
    assert "the contents of the objective's file differ" in capsys.readouterr().err.splitlines()[-1]
    assert train('run', option, words=('--resume', '--allow-changes')) == 0


def _raw(work_dir: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (work_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines())
    return {line['step']: line for line in lines if 'loss' in line}


def test_a_run_begun_before_there_were_objectives_resumes(train: Train, tmp_path: Path) -> None:  # noqa: F811
    assert train('whole') == 0
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoint-00000004')
    path = newest_run_file(tmp_path / 'run')
    content = json.loads(path.read_text(encoding='utf-8'))
    assert content['run'].pop('objective') == 'sft'
    path.write_text(json.dumps(content), encoding='utf-8')
    _count_again(path)
    assert train('run') == 0
    assert result(tmp_path / 'run') == result(tmp_path / 'whole')


def newest_run_file(work_dir: Path) -> Path:
    return sorted(work_dir.glob('checkpoint-*/run.json'))[-1]


def test_an_error_in_ones_own_code_is_named_with_its_line(
    file: Path,
    train: Train,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train('run', f'objective={file}:broken') == 1
    last = capsys.readouterr().err.splitlines()[-1]
    line = 1 + LOSS.splitlines().index('    return rows.log_prob / 0 + undefined')
    assert f"objective broken failed: NameError: name 'undefined' is not defined ({file}:{line})" in last
    assert not (tmp_path / 'run' / 'last').exists()
    with pytest.raises(FileNotFoundError):
        newest(tmp_path / 'run')
