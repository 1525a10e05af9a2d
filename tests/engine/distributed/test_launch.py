"""Who starts whom: nodes and their checks, the variables of torchrun and Slurm, the scripts' usage."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from xtuner.engine.distributed import launch
from xtuner.engine.distributed.launch import Nodes
from xtuner.errors import UsageError


def test_nodes_that_cannot_be() -> None:
    assert Nodes(8, 4, 3, 'host0').world_size == 32
    with pytest.raises(UsageError, match='--node-rank 4 must be from 0 to --nnodes - 1, 3'):
        Nodes(8, 4, 4, 'host0')
    with pytest.raises(UsageError, match='--nnodes needs --master-addr'):
        Nodes(8, 2, 0)


def test_more_processes_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UsageError, match='--nproc-per-node is 4, but this machine has 2 GPUs'):
        Nodes(4)


def test_slurm_s_variables_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    slurm = {'SLURM_PROCID': '9', 'SLURM_NTASKS': '16', 'SLURM_LOCALID': '1', 'SLURM_STEP_NODELIST': 'node[3-4]',
             'SLURM_JOB_ID': '123456'}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    answers = {'hostnames': 'node3\nnode4\n', 'node': 'NodeName=node3 CPUTot=8\n   NodeAddr=10.1.2.3 NodeHostName=x\n'}
    monkeypatch.setattr(launch.subprocess, 'check_output', lambda words, **_: answers[words[2]])
    for known, address in ((False, '10.1.2.3'), (True, 'node3')):  # a node's name need not be a host's
        monkeypatch.setattr(launch, '_is_resolvable', lambda host, known=known: known)
        with monkeypatch.context() as inner:
            inner.setattr(os, 'environ', dict(os.environ))
            launch._take_slurm_variables()
            assert os.environ['MASTER_ADDR'] == address
    with monkeypatch.context() as inner:
        inner.setattr(os, 'environ', dict(os.environ))
        launch._take_slurm_variables()
        names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
        assert [os.environ[name] for name in names] == ['9', '16', '1', 'node3', '23456']


def test_slurm_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('SLURM_NODELIST', 'node3')
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(UsageError, match=r'hostnames node3` failed \(.*No such file.*\); set MASTER_ADDR'):
        launch._take_slurm_variables()
    (tmp_path / 'scontrol').write_text('#!/bin/sh\necho no controller >&2\nexit 1\n', encoding='utf-8')
    (tmp_path / 'scontrol').chmod(0o755)
    with pytest.raises(UsageError, match=r'failed \(no controller\); set MASTER_ADDR'):
        launch._take_slurm_variables()


def test_an_address_that_nobody_knows_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (('RANK', '0'), ('WORLD_SIZE', '2'), ('LOCAL_RANK', '0'), ('MASTER_ADDR', 'nobody.invalid')):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UsageError, match=r'MASTER_ADDR nobody\.invalid cannot be resolved on this machine'),
        launch.process_group('pytorch'),
    ):
        raise AssertionError('a group was made')


@pytest.mark.parametrize('name', ['dist_train.sh', 'slurm_train.sh'])
def test_a_script_without_arguments_tells_its_usage(name: str) -> None:
    result = subprocess.run(['bash', str(ROOT / 'tools' / name)], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert f'tools/{name}' in result.stderr


def test_the_scripts_start_what_they_say(tmp_path: Path) -> None:
    """Instead of python and srun, programs that print their arguments."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'NNODES': '2', 'NODE_RANK': '1',
                                'MASTER_ADDR': 'host0', 'PORT': '29555', 'GPUS': '16'}  # fmt: skip
    environment.pop('MASTER_PORT', None)

    def words(*call: str) -> str:
        return subprocess.run(['bash', *call], capture_output=True, text=True, check=True, env=environment).stdout

    started = words(str(ROOT / 'tools' / 'dist_train.sh'), 'cfg', '8', '--seed', '1')
    assert '--nnodes 2 --node-rank 1 --master-addr host0 --master-port 29555 --nproc-per-node 8' in started
    assert started.strip().endswith('train.py cfg --launcher pytorch --seed 1')
    started = words(str(ROOT / 'tools' / 'slurm_train.sh'), 'part', 'job', 'cfg', '--seed', '1')
    assert '-p part --job-name job --gres gpu:8 --ntasks 16 --ntasks-per-node 8' in started
    assert '--kill-on-bad-exit=1' in started
    assert started.strip().endswith('train.py cfg --launcher slurm --seed 1')


@pytest.mark.parametrize(
    ('launcher', 'local_rank', 'visible', 'index'),
    [
        ('slurm', 3, 8, 3),
        ('slurm', 3, 1, 0),  # --gpus-per-task=1: each task sees its own alone
        ('slurm', 3, 2, 1),
        ('pytorch', 3, 1, 0),  # a wrapper set CUDA_VISIBLE_DEVICES for each process
        ('pytorch', 3, 4, 3),
    ],
)
def test_a_process_takes_a_card_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, launcher: str, local_rank: int, visible: int, index: int
) -> None:
    monkeypatch.setattr(launch.torch.cuda, 'device_count', lambda: visible)
    assert launch._device_index(local_rank, launcher) == index


def test_more_processes_of_torchrun_than_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.torch.cuda, 'device_count', lambda: 4)
    with pytest.raises(UsageError, match='LOCAL_RANK is 5, but this process sees 4 GPUs'):
        launch._device_index(5, 'pytorch')


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm'])
def test_the_group_is_joined_with_that_card(monkeypatch: pytest.MonkeyPatch, launcher: str) -> None:
    chosen: list[int] = []
    variables = {'RANK': '3', 'WORLD_SIZE': '4', 'LOCAL_RANK': '3', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(launch.torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(launch.torch.cuda, 'set_device', chosen.append)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.distributed, 'init_process_group', stop)
    with pytest.raises(KeyboardInterrupt), launch.process_group(launcher):
        pass
    assert chosen == [0]
