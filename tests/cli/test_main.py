"""The command line: exit statuses, one line of error, nothing heavy imported before it is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from xtuner import __version__
from xtuner.cli.main import COMMANDS, main

pytestmark = pytest.mark.unit

if TYPE_CHECKING:
    from xtuner.config.schema import TrainConfig


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, '-m', 'xtuner.cli.main', *words], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize('words', [['--help'], ['list-cfg'], ['copy-cfg', '--help'], ['train', '--help']])
def test_light_commands_never_import_torch(words: list[str]) -> None:
    code = (
        'import sys; from xtuner.cli.main import main\n'
        f'try: status = main({words!r})\n'
        'except SystemExit as end: status = end.code\n'
        "heavy = {'torch', 'transformers', 'mmengine', 'datasets', 'numpy'} & set(sys.modules)\n"
        'print(status, sorted(heavy), file=sys.stderr)'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == '0 []'


@pytest.mark.parametrize('name', sorted(COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*name.split(), '--help'])
    assert end.value.code == 0
    assert f'xtuner {name}' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('words', 'status', 'message'),
    [
        ([], 2, ''),
        (['lisst-cfg'], 2, "unknown command 'lisst-cfg'; did you mean 'list-cfg'"),
        (['convert'], 2, '`xtuner convert` needs one of: merge'),
        (
            ['train', 'internlm_7b_qlora_oasst1', '--data', ''],
            2,
            '--data: is empty; is a shell variable unset?',
        ),
        (['train', 'internlm_7b_qlora_oasst1', '--resume', ''], 2, '--resume: is empty'),
        (['convert', 'merge', 'a', '', 'c'], 2, 'adapter: is empty'),
        (['convert', 'merge', 'a', 'b', 'c', '--weight', 'nan'], 2, '--weight: must be a finite number'),
        (['convert', 'to-lama'], 2, ", not 'to-lama'; did you mean 'to-llama'"),
        (['train'], 2, 'the following arguments are required: config'),
        (['train', 'internlm_7b_qlora_oasst1', '--max-steps', '0'], 2, '--max-steps: must be at least 1'),
        (['train', 'internlm_7b_qlora_oasst1', '--cfg-options', 'x'], 2, '--cfg-options takes KEY=VALUE'),
        (['train', 'internlm_7b_qlora_oast1'], 1, "no config 'internlm_7b_qlora_oast1'; did you mean"),
        (['train', '.'], 1, "'.' is not a config: give a shipped name (`xtuner list-cfg`) or a .py file"),
        (
            ['train', 'internlm_7b_qlora_oasst1', '--cfg-options', 'optimizer.lr=nan'],
            1,
            "`optimizer.lr` must be a number, got 'nan'",
        ),
        (['chat', 'x', '--temperature', '-1'], 2, '--temperature: must be 0 or more'),
        (['chat', 'x', '--top-p', '0'], 2, '--top-p: must be above 0'),
        (['convert', 'merge', 'a', 'b', 'c', '--max-shard-size', 'big'], 2, "'big' is not a size"),
        (['print-config', 'internlm_7b_qlora_oasst1', '--cfg-options', 'model.pth=x'], 1, "did you mean 'path'"),
        (['list-cfg', '-p', 'qwenn'], 1, "no config name contains 'qwenn'"),
    ],
)
def test_a_wrong_call_is_one_line(
    words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    err = capsys.readouterr().err
    assert message in err
    assert err.count('\n') <= 1


@pytest.mark.torch
@pytest.mark.parametrize(
    ('words', 'resume'),
    [
        (['--resume', 'NAME', '--max-steps', '5'], 'newest'),
        (['--max-steps', '5', '--resume', 'NAME'], 'newest'),
        (['NAME', '--max-steps', '5', '--resume'], 'newest'),
        (['--resume', '--max-steps', '5', 'NAME'], 'newest'),
        (['--resume', 'somewhere', 'NAME', '--max-steps', '5'], Path('somewhere')),
        (['--max-steps', '5', '--cfg-options', 'schedule.batch_size=2', 'NAME'], None),
        (['--resume', '--max-steps', '5', '--cfg-options', 'schedule.batch_size=2', 'NAME'], 'newest'),
    ],
)
def test_a_config_may_stand_anywhere(words: list[str], resume: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from xtuner.engine import run as engine

    called = {}

    def train(config: TrainConfig, **options: Any) -> Path:
        called.update(options, config=config)
        return Path('checkpoint')

    monkeypatch.setattr(engine, 'train', train)
    monkeypatch.setattr('xtuner.cli.train.check_config', lambda config: None)  # neither model nor data is here
    monkeypatch.setattr('xtuner.engine.checkpoint.resume.check_start', lambda *_: None)
    assert main(['train', *(word.replace('NAME', 'internlm_7b_qlora_oasst1') for word in words)]) == 0
    assert called['config'].schedule.max_steps == 5
    assert called['config'].schedule.batch_size == (2 if 'schedule.batch_size=2' in words else 1)
    assert called['start'].resume == resume
    assert called['work_dir'] == Path('work_dirs/internlm_7b_qlora_oasst1')


def test_a_checkpoint_alone_is_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['train', '--resume', str(tmp_path)]) == 2
    assert 'arguments are required: config' in capsys.readouterr().err
    assert main(['train', '--resume', 'internlm_7b_qlora_oast1']) == 1
    assert "no config 'internlm_7b_qlora_oast1'; did you mean" in capsys.readouterr().err


def test_the_newest_checkpoint_has_one_name() -> None:
    from xtuner.cli import train
    from xtuner.engine.checkpoint.resume import NEWEST

    assert train._NEWEST == NEWEST


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='/dev/full is of Linux')
def test_where_the_output_cannot_go() -> None:
    command = f'{sys.executable} -m xtuner.cli.main list-cfg'
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONUNBUFFERED'}

    def shell(line: str) -> tuple[int, str]:
        done = subprocess.run(['bash', '-c', line], capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stderr

    assert shell(f'{command} > /dev/full') == (1, 'xtuner: error: standard output: No space left on device\n')
    assert shell(f'set -o pipefail; {command} | true') == (1, '')
    assert shell(f'{command} >&-') == (0, '')
    assert shell(f'{command} 2>&-') == (0, '')


def test_the_exit_status_is_the_process_s_own() -> None:
    assert run('nonsense').returncode == 2
    assert run('train', 'nonsense').returncode == 1
    assert run('--version').stdout == f'xtuner {__version__}\n'


def test_debug_adds_the_traceback() -> None:
    assert 'Traceback' not in run('train', 'nonsense').stderr
    assert 'Traceback' in run('train', 'nonsense', '--debug').stderr


def test_list_cfg_filters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['list-cfg', '-p', 'chat_7b_qlora']) == 0
    names = capsys.readouterr().out.split()
    assert 'internlm_chat_7b_qlora_oasst1' in names
    assert all('chat_7b_qlora' in name for name in names)


def test_copy_cfg_writes_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['copy-cfg', 'internlm_7b_qlora_oasst1', str(tmp_path / 'new')]) == 0
    written = Path(capsys.readouterr().out.strip())
    before = written.read_text(encoding='utf-8')
    written.write_text(before + '# edited\n', encoding='utf-8')
    assert main(['copy-cfg', 'internlm_7b_qlora_oasst1', str(tmp_path / 'new')]) == 1
    assert 'already exists; nothing was written' in capsys.readouterr().err
    assert written.read_text(encoding='utf-8').endswith('# edited\n')
    for folder, reason in ((written, f'{written} already exists'), (written / 'below', 'cannot write .*: Not a')):
        assert main(['copy-cfg', 'internlm_7b_qlora_oasst1', str(folder)]) == 1
        assert re.match(f'xtuner: error: {reason}', capsys.readouterr().err)


def test_print_config_shows_what_was_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    words = ['print-config', 'internlm_7b_qlora_oasst1', '--model', 'here', '--cfg-options', 'optimizer.lr=1e-3']
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "path='here'" in out
    assert 'lr=0.001' in out


def test_a_name_that_the_locale_cannot_read_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = '数据'.encode().decode('ascii', 'surrogateescape')  # as Python reads it under `LC_ALL=C`
    monkeypatch.setattr('xtuner.cli.main._run', lambda words: name.encode())
    assert main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("xtuner: error: '数据' in the name of a file") and 'PYTHONUTF8=1' in error
    assert error.count('\n') == 1


def test_output_that_the_locale_lacks_is_escaped() -> None:
    code = "from xtuner.cli import main; main._run = lambda words: print('\\u6570') or 0; main.command()"
    locale = {'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0', 'LC_ALL': 'C'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, env=os.environ | locale, check=False)
    assert (done.stdout, done.stderr) == (b'\\u6570\n', b'')
