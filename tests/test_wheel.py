"""The wheel carries what stands beside the package in the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from xtuner.config.find import list_configs


@pytest.fixture(scope='module')
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content, as an installation would have it."""
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob('*.whl')
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / 'site')
    return folder / 'site'


def run(site: Path, *words: str) -> str:
    """Runs the installed package from another folder, without the checkout on the path."""
    code = 'import sys; sys.path.insert(0, sys.argv.pop(1)); from xtuner.cli.main import main; sys.exit(main())'
    command = [sys.executable, '-c', code, str(site), *words]
    return subprocess.run(command, cwd=site.parent, capture_output=True, text=True, check=True).stdout


def test_every_config_is_found_and_loads_from_the_installed_package(installed: Path) -> None:
    assert run(installed, 'list-cfg').splitlines() == list(list_configs())
    assert "path='internlm/internlm-7b'" in run(installed, 'print-config', 'internlm_7b_qlora_oasst1')
    for name in ('tools/train.py', 'tools/web_demo.py', 'tools/.streamlit/config.toml', 'chat/web/icon.svg',
                 'tracking/report/page.css', 'tracking/report/page.js'):  # fmt: skip
        assert (installed / 'xtuner' / name).is_file(), name


def test_nothing_else_travels(installed: Path) -> None:
    names = {p.name for p in installed.iterdir()}
    assert 'xtuner' in names
    assert not names & {'tests', 'demo', 'configs', 'tools', 'benchmarks'}
