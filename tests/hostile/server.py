"""A process that has imported everything and runs command lines in forks of itself, each with limits.

It reads a job a line from standard input and answers with a line: `{"argv": [...], "folder": ..., "stdin": ...}` gives
`{"status": ..., "err": ..., "seconds": ...}`; the status is None for a command that the limits have ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 20, 100, 12 * 2**30


def import_everything() -> None:
    import torch

    from xtuner.cli.log import start_logging
    from xtuner.cli.main import COMMANDS

    start_logging()
    torch.set_num_threads(1)
    import importlib

    for command in COMMANDS.values():
        importlib.import_module(command.module)
    for name in ('xtuner.engine.run', 'xtuner.engine.estimate_text', 'xtuner.chat.terminal', 'xtuner.serve.run',
                 'xtuner.convert.merge', 'xtuner.convert.verify', 'xtuner.convert.ollama', 'xtuner.convert.pth_to_hf',
                 'xtuner.convert.split', 'xtuner.dataset.check', 'xtuner.dataset.show', 'xtuner.tracking.report.page',
                 'xtuner.engine.doctor', 'tensorboard', 'peft', 'bitsandbytes', 'datasets', 'sympy'):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Runs one command line in a fork."""
    folder, began = Path(job['folder']), time.monotonic()
    (folder / '.stdin').write_text(job.get('stdin', ''))
    if (child := os.fork()) == 0:
        os._exit(_command(folder, job['argv']))
    status = _wait(child, began + WALL_SECONDS)
    err = (folder / '.stderr').read_bytes().decode('utf-8', 'replace')
    return {'status': status, 'err': err, 'seconds': round(time.monotonic() - began, 2)}


def _command(folder: Path, argv: list[str]) -> int:
    os.setpgid(0, 0)
    os.chdir(folder)
    for number, (name, flags) in enumerate((('.stdin', os.O_RDONLY), ('.stdout', os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
                                            ('.stderr', os.O_WRONLY | os.O_CREAT | os.O_TRUNC))):  # fmt: skip
        os.dup2(os.open(name, flags), number)
    sys.stdin = open('.stdin', encoding='utf-8')  # noqa: SIM115  the fork has read ahead in the other
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import xtuner.serve.run
    from xtuner.cli.main import main

    xtuner.serve.run.serve = lambda *args, **kwargs: None  # ready: nothing of a file is read after that
    try:
        status = main(argv)
    except SystemExit as error:
        status = int(error.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _wait(child: int, until: float) -> int | None:
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else None
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what libraries print is no answer
    import_everything()
    from tests.hostile.world import make_world

    make_world(Path(sys.argv[1]), run)
    print('ready', file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == '__main__':
    main()
