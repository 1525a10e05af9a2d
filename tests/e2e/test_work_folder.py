"""What a run finds in its base and in its work folder: settings that transformers refuses, entries of others."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from tests.e2e.test_main_job import train_words
from xtuner.cli.main import main


@pytest.mark.parametrize('options', [(), ('adapter=None', 'quantization=None')], ids=['adapter', 'full'])
def test_a_base_with_sampling_settings_alone_reaches_its_checkpoint(
    tiny_internlm: Path, conversations: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    base = shutil.copytree(tiny_internlm, tmp_path / 'base')
    settings = {'temperature': 0.9, 'top_p': 0.6, 'eos_token_id': [2, 3]}  # as Vicuna's
    (base / 'generation_config.json').write_text(json.dumps(settings), encoding='utf-8')
    before = os.umask(0o022)
    try:
        assert main(train_words(base, conversations, tmp_path / 'run', 'samples.prompts=[]', *options, steps=1)) == 0
    finally:
        os.umask(before)
    folder = tmp_path / 'run' / 'checkpoint-00000001'
    saved = json.loads((folder / 'generation_config.json').read_text(encoding='utf-8'))
    assert saved == {'eos_token_id': [799, 2, 3]}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_a_resumed_run_reports_its_own_checkpoint(
    tiny_internlm: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / 'run'
    words = train_words(tiny_internlm, conversations, run, 'samples.prompts=[]', steps=4)
    assert main(words) == 0
    (run / 'checkpoint-00000099').symlink_to('/etc')
    (run / ('checkpoint-' + '9' * 30)).mkdir()
    moved = (run / 'checkpoint-00000002').rename(tmp_path / 'larger_disk')
    (run / 'checkpoint-00000002').symlink_to(moved)
    shutil.rmtree(run / 'checkpoint-00000004')
    capsys.readouterr()
    assert main([words[0], '--resume', *words[1:]]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[-1] == str(run / 'checkpoint-00000004')
    assert f'resuming from {run / "checkpoint-00000002"} at step 2' in told.err
    assert moved.is_dir() and (run / 'checkpoint-00000099').is_symlink()
    assert main([words[0], '--resume', *words[1:]]) == 0  # nothing is left to do
    assert capsys.readouterr().out.splitlines()[-1] == str(run / 'checkpoint-00000004')
