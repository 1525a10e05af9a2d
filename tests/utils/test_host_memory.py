"""Available memory from made-up /proc and control group trees: the smallest of the system's and each group's."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from xtuner import ranks
from xtuner.utils.host_memory import available_bytes, total_bytes

pytestmark = pytest.mark.unit

GIB = 2**30
V2_MOUNT = '30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate'
V1_MOUNT = '35 31 0:32 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory'
OTHER_MOUNT = '32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct'


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def machine(root: Path, *, member: str = '', mounts: str = '') -> Path:
    """64 GiB, of which 1 is free and 20 are available: the rest of it is page cache."""
    numbers = {'MemTotal': 64, 'MemFree': 1, 'MemAvailable': 20}
    write(root / 'proc/meminfo', ''.join(f'{k}:  {v * 2**20} kB\n' for k, v in numbers.items()))
    write(root / 'proc/self/cgroup', member)
    write(root / 'proc/self/mountinfo', f'{OTHER_MOUNT}\n{mounts}\n')
    return root


def group_v2(folder: Path, limit: str, used_gib: int, *, cached_gib: int = 0, high: str = 'max') -> None:
    write(folder / 'memory.max', f'{limit}\n')
    write(folder / 'memory.high', f'{high}\n')
    write(folder / 'memory.current', f'{used_gib * GIB}\n')
    half = cached_gib * GIB // 2
    write(folder / 'memory.stat', f'anon 5\ninactive_file {half}\nactive_file {half}\nslab_reclaimable 0\nshmem 77\n')


def group_v1(folder: Path, limit: int, used_gib: int, *, cached_gib: int = 0) -> None:
    write(folder / 'memory.limit_in_bytes', f'{limit}\n')
    write(folder / 'memory.usage_in_bytes', f'{used_gib * GIB}\n')
    write(folder / 'memory.stat', f'cache 9\ntotal_inactive_file {cached_gib * GIB}\ntotal_active_file 0\n')


def test_page_cache_is_available(tmp_path: Path) -> None:
    root = machine(tmp_path)
    assert available_bytes(root) == 20 * GIB
    assert total_bytes(root) == 64 * GIB


def test_a_container_with_its_own_namespace(tmp_path: Path) -> None:
    root = machine(tmp_path, member='0::/\n', mounts=V2_MOUNT.format(top='/'))
    group_v2(root / 'sys/fs/cgroup', str(8 * GIB), 7, cached_gib=4)
    assert available_bytes(root) == 5 * GIB
    assert total_bytes(root) == 8 * GIB


def test_any_group_above_may_be_the_tightest(tmp_path: Path) -> None:
    root = machine(tmp_path, member='0::/slice/job/task\n', mounts=V2_MOUNT.format(top='/'))
    top = root / 'sys/fs/cgroup'
    group_v2(top / 'slice', str(16 * GIB), 14)
    group_v2(top / 'slice/job', 'max', 1)
    group_v2(top / 'slice/job/task', str(12 * GIB), 1)
    assert available_bytes(root) == 2 * GIB
    assert total_bytes(root) == 12 * GIB


def test_the_throttling_limit_counts(tmp_path: Path) -> None:
    root = machine(tmp_path, member='0::/\n', mounts=V2_MOUNT.format(top='/'))
    group_v2(root / 'sys/fs/cgroup', 'max', 1, high=str(4 * GIB))
    assert available_bytes(root) == 3 * GIB


def test_a_limit_that_is_used_up_leaves_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, member='0::/\n', mounts=V2_MOUNT.format(top='/'))
    group_v2(root / 'sys/fs/cgroup', str(4 * GIB), 5)
    assert available_bytes(root) == 0


@pytest.mark.parametrize('top', ['/docker/abc', '/', '/docker/other'])
def test_a_container_that_sees_the_machine_s_paths(tmp_path: Path, top: str) -> None:
    """Docker mounts the container's own group, and /proc names it as the machine does."""
    root = machine(tmp_path, member='0::/docker/abc\n', mounts=V2_MOUNT.format(top=top))
    own = root / 'sys/fs/cgroup' / ('docker/abc' if top == '/' else '')
    group_v2(own, str(6 * GIB), 1)
    assert available_bytes(root) == 5 * GIB


def test_a_group_outside_of_the_namespace(tmp_path: Path) -> None:
    root = machine(tmp_path, member='0::/../../other\n', mounts=V2_MOUNT.format(top='/'))
    group_v2(root / 'sys/fs/cgroup', str(6 * GIB), 2)
    group_v2(root / 'other', str(GIB), 0)  # where a path with '..' would lead
    assert available_bytes(root) == 4 * GIB


def test_version_1(tmp_path: Path) -> None:
    member = '9:name=systemd:/\n4:memory:/jobs/one\n2:cpu,cpuacct:/jobs/one\n0::/\n'
    root = machine(tmp_path, member=member, mounts=V1_MOUNT.format(top='/'))
    group_v1(root / 'sys/fs/cgroup/memory', 9223372036854771712, 40)
    group_v1(root / 'sys/fs/cgroup/memory/jobs', 10 * GIB, 9, cached_gib=3)
    group_v1(root / 'sys/fs/cgroup/memory/jobs/one', 9223372036854771712, 1)
    assert available_bytes(root) == 4 * GIB
    assert total_bytes(root) == 10 * GIB


def test_both_versions_at_once(tmp_path: Path) -> None:
    unified = V2_MOUNT.format(top='/').replace('/sys/fs/cgroup ', '/sys/fs/cgroup/unified ')
    root = machine(tmp_path, member='4:memory:/a\n0::/b\n', mounts=f'{V1_MOUNT.format(top="/")}\n{unified}')
    group_v1(root / 'sys/fs/cgroup/memory/a', 9 * GIB, 2)
    (root / 'sys/fs/cgroup/unified/b').mkdir(parents=True)  # no memory controller there
    assert available_bytes(root) == 7 * GIB


@pytest.mark.parametrize('text', ['', 'nonsense', '0', ':::::', '0::', '\x00\xff', '1:memory'])
def test_files_of_another_form_are_passed_over(tmp_path: Path, text: str) -> None:
    root = machine(tmp_path, member=text, mounts=text)
    write(root / 'sys/fs/cgroup/memory.max', text)
    assert available_bytes(root) == 20 * GIB


def test_elsewhere_psutil_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=3 * GIB, total=16 * GIB))
    monkeypatch.setitem(sys.modules, 'psutil', fake)
    assert (available_bytes(tmp_path), total_bytes(tmp_path)) == (3 * GIB, 16 * GIB)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_this_machine_tells_a_plausible_number() -> None:
    import psutil

    assert 2**26 < available_bytes() <= total_bytes() <= psutil.virtual_memory().total
    assert available_bytes() <= 1.1 * psutil.virtual_memory().available


@pytest.mark.torch
@pytest.mark.parametrize(('name', 'value', 'count'), [('LOCAL_WORLD_SIZE', '8', 8), ('SLURM_NTASKS_PER_NODE', '4', 4),
                                                      ('LOCAL_WORLD_SIZE', 'x', 1)])  # fmt: skip
def test_ranks_of_a_machine_share_it(name: str, value: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from xtuner.fused import offload

    monkeypatch.delenv('LOCAL_WORLD_SIZE', raising=False)
    monkeypatch.delenv('SLURM_NTASKS_PER_NODE', raising=False)
    monkeypatch.setenv(name, value)
    assert ranks.num_on_this_machine() == count
    monkeypatch.setattr(offload, 'available_bytes', lambda: 800)
    assert offload.free_bytes(torch.device('cpu')) == 800 // count
    assert offload.free_host_bytes() == 800
