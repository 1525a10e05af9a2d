"""What is refused before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engine.test_estimate import FLAGSHIP, GIB
from xtuner.config.load import load_config
from xtuner.engine import preflight
from xtuner.engine.build import RunInputs
from xtuner.errors import TrainingError


class _Gpu:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, free_gib: float) -> None:
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(free_gib * GIB), 24 * GIB))


def test_a_run_that_cannot_fit_is_refused_with_what_to_turn(
    folder_7b: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preflight, 'data_size', lambda dataset: None)
    data = RunInputs(folder_7b, '', None, None, None, None, {})  # type: ignore[arg-type]
    device = torch.device('cuda', 0)
    config = load_config(FLAGSHIP)
    _Gpu(monkeypatch, 5.0)
    with pytest.raises(
        TrainingError, match=r'predicted to need \d.\d\d GiB of cuda:0, but only 5.00 GiB .*largest: base'
    ):
        preflight.check_memory(config, data, device, 1)
    preflight.check_memory(load_config(FLAGSHIP, {'runtime.check_memory': False}), data, device, 1)
    assert 'dataset.max_length=1024 saves' in caplog.text
    _Gpu(monkeypatch, 10.0)
    preflight.check_memory(config, data, device, 1)
    preflight.check_memory(config, data, torch.device('cpu'), 1)
    _Gpu(monkeypatch, 1.0)
    preflight.check_memory(config, data, device, 4, strategy='fsdp')  # what it saves is not predicted
