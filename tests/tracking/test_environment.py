"""Versions, devices and the state of the repository."""

from __future__ import annotations

import subprocess
from pathlib import Path

from xtuner.tracking.environment import devices, git_state, versions


def test_git_state_counts_changes(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e@example.org']
    subprocess.run([*git, 'init', '-q', '-b', 'main'], check=True)
    (tmp_path / 'a').write_text('1', encoding='utf-8')
    subprocess.run([*git, 'add', '.'], check=True)
    subprocess.run([*git, 'commit', '-qm', 'first'], check=True)
    clean = git_state(tmp_path)
    assert clean
    assert (clean['branch'], clean['num_changed_files'], len(clean['commit'])) == ('main', 0, 40)
    (tmp_path / 'a').write_text('2', encoding='utf-8')
    (tmp_path / 'b').write_text('2', encoding='utf-8')
    assert (git_state(tmp_path) or {})['num_changed_files'] == 2


def test_versions_and_devices_are_those_of_this_machine() -> None:
    import torch

    assert versions()['torch'] == torch.__version__
    assert devices()['cores'] >= 1
    assert devices()['processor']
