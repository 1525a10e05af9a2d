"""Progress as log lines."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from xtuner.model.loading import load_model
from xtuner.utils.progress import LoggedProgress


def test_a_line_every_few_seconds_says_how_long_it_will_take(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    now = [0.0]
    progress = LoggedProgress(range(10), desc='Loading weights', clock=lambda: now[0])
    for _ in progress:
        now[0] += 3
    progress.set_postfix(anything=1)
    progress.close()
    assert caplog.messages == [
        'Loading weights: 20 % · eta 0:24',
        'Loading weights: 40 % · eta 0:18',
        'Loading weights: 60 % · eta 0:12',
        'Loading weights: 80 % · eta 0:06',
    ]


def test_loading_draws_no_bar(
    tiny_internlm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr('xtuner.utils.progress._EVERY_S', 0)
    load_model(tiny_internlm, dtype=torch.float32)
    err = capsys.readouterr().err  # lines of the log, where an earlier test has begun one
    assert '\r' not in err and 'it/s' not in err
    assert any(line.startswith('Loading weights: ') for line in caplog.messages)


def test_bitsandbytes_does_not_advise_a_package_that_is_never_used() -> None:
    log = logging.getLogger('bitsandbytes.backends.cpu.ops')

    def passes(text: str) -> bool:
        return bool(log.filter(log.makeRecord(log.name, logging.WARNING, __file__, 1, text, ('x',), None)))

    assert not passes('Failed to load CPU gemm_4bit_forward: %s. Please make sure you already `pip install kernels`')
    assert passes('something else: %s')
