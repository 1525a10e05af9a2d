"""A work folder and its file `last` stand for a checkpoint wherever one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xtuner.engine.checkpoint.resume import ResumeOptions
from xtuner.errors import CheckpointError, ModelError
from xtuner.model.hub import resolve_model
from xtuner.model.run_folder import resolve_checkpoint, work_folder

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2):
        folder = tmp_path / 'run' / f'checkpoint-{step:08}'
        folder.mkdir(parents=True)
        (folder / 'adapter_config.json').write_text('{}')
        (folder / 'manifest.json').write_text('{}')
        (folder / 'xtuner.json').write_text(json.dumps({'base': 'some/base'}))
    (tmp_path / 'run' / 'last').write_text('checkpoint-00000002\n')
    (tmp_path / 'run' / 'best').write_text('checkpoint-00000001\n')
    return tmp_path / 'run'


def test_each_way_to_name_a_checkpoint(run: Path) -> None:
    first, second = run / 'checkpoint-00000001', run / 'checkpoint-00000002'
    ways = {run: second, run / 'last': second, run / 'best': first, first: first, run / 'none': run / 'none'}
    assert {way: resolve_checkpoint(way) for way in ways} == ways
    assert ResumeOptions(weights=run).weights == second
    assert ResumeOptions(resume=run / 'best').resume == first
    assert [work_folder(path) for path in (run, run / 'last', first)] == [run, run, run]


@pytest.mark.parametrize('content', ['checkpoint-00000003', '../elsewhere', '', 'x' * 10_000])
def test_a_file_that_names_none(run: Path, content: str) -> None:
    (run / 'last').write_text(content)
    with pytest.raises(CheckpointError, match=r'run/last names .*, but there is no such checkpoint'):
        resolve_checkpoint(run)
    (run / 'last').write_bytes(b'\xff')
    with pytest.raises(CheckpointError, match='run/last cannot be read'):
        resolve_checkpoint(run)


def test_an_adapter_is_no_model_and_names_its_base(run: Path) -> None:
    for named in (run, run / 'last', run / 'checkpoint-00000001'):
        with pytest.raises(
            ModelError, match=r"contains an adapter, not a model; use its base as the model \('some/base'\)"
        ):
            resolve_model(named)


def test_a_run_of_all_weights_is_a_model(run: Path) -> None:
    for folder in run.glob('checkpoint-*'):
        (folder / 'adapter_config.json').rename(folder / 'config.json')
    assert resolve_model(run) == run / 'checkpoint-00000002'


def test_no_run_goes_on_from_a_plain_adapter(run: Path) -> None:
    (run / 'checkpoint-00000002' / 'manifest.json').unlink()
    with pytest.raises(CheckpointError, match=r"without the trainer's state.*--start-from uses its weights"):
        ResumeOptions(resume=run)
