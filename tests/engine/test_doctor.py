"""The doctor: what works is tried, what does not is named with what to do, and nothing personal is printed."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner.cli.main import main
from xtuner.engine import doctor
from xtuner.engine.doctor import ABSENT, FAILED, NOTE, OK, Check, check_4bit, check_cache, check_dependencies, check_gpu

pytest.importorskip('bitsandbytes')


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['doctor']) == 0
    out = capsys.readouterr().out
    assert out.startswith('### xtuner doctor\n')
    assert f'| torch | {torch.__version__} |' in out
    assert '- ok: 4-bit product on the CPU, forward and backward' in out
    assert '- ok: cache folder' in out


def test_a_wrong_product_is_a_failure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import bitsandbytes as bnb

    right = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, 'forward', lambda self, x: right(self, x) * 1.1)
    assert check_4bit(torch.device('cpu')).state == FAILED
    assert main(['doctor']) == 1
    out = capsys.readouterr().out
    assert '- FAILED: 4-bit product on the CPU, forward and backward: max relative error' in out
    assert '1. 4-bit product on the CPU, forward and backward: install a bitsandbytes' in out


def test_what_cannot_run_is_a_failure_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bitsandbytes as bnb

    def broken(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError('libbitsandbytes_cuda999.so\nis missing')

    monkeypatch.setattr(bnb.nn.Linear4bit, '__init__', broken)
    assert main(['doctor']) == 1
    found = capsys.readouterr()
    assert 'FAILED: 4-bit product on the CPU: RuntimeError: libbitsandbytes_cuda999.so is missing' in found.out
    assert 'Traceback' not in found.err


def test_dependencies_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, 'requires', lambda name: ['peft>=0.21,<0.22', 'torch>=2', 'x; extra=="y"'])
    known = {'peft': '0.99.0', 'torch': '2.13.0'}
    monkeypatch.setattr(importlib.metadata, 'version', lambda name: known[name])
    [check] = check_dependencies()
    assert (check.name, check.state) == ('peft', NOTE)
    assert check.detail == '0.99.0 is untested, <0.22,>=0.21 is tested'

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, 'version', missing)
    assert [c.state for c in check_dependencies()] == [FAILED, FAILED]


def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(doctor, 'driver_version', lambda: None)
    assert check_gpu()[0].state == ABSENT
    monkeypatch.setattr(doctor, 'driver_version', lambda: '580.1')
    monkeypatch.setattr(torch.version, 'cuda', None)
    assert 'built without CUDA' in check_gpu()[0].detail
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    assert 'finds no GPU under driver 580.1' in check_gpu()[0].detail


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_cache().state == OK
    (tmp_path / 'file').write_text('', encoding='utf-8')
    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path / 'file' / 'cache'))
    check = check_cache()
    assert check.state == FAILED
    assert 'XTUNER_CACHE' in check.advice


def test_home_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('HOME', str(tmp_path))
    lines = doctor.report([Check('x', FAILED, f'{tmp_path}/models broke', f'look at {tmp_path}/models')])
    assert '- FAILED: x: ~/models broke' in lines
    assert str(tmp_path) not in '\n'.join(lines)


def test_driver_version_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    line = 'NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (someone@somewhere)\n'
    monkeypatch.setattr(Path, 'read_text', lambda self, **kwargs: line)
    assert doctor.driver_version() == '580.159.04'
