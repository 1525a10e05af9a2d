"""Kills a merge again and again, and compares what the runs that go on after it write; `merge.py --kills` calls it."""

from __future__ import annotations

import hashlib
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

_ENOUGH = 0.8  # of the bytes in finished shards: the next run is let go on to its end


def digest(folder: Path) -> str:
    """A hash of a folder's files and their names."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode())
        with path.open('rb') as file:
            while block := file.read(2**24):
                whole.update(block)
    return whole.hexdigest()[:16]


def kill_often(command: Sequence[str], out: Path, kills: int, seconds: float, expected: str) -> None:
    """Kills a merge that has begun to write, at random moments of what is left to do.

    A kill counts where the process was running and ended by it, with nothing under the final name. Once most is
    written, the next run goes on to the end, and its bytes are compared; then the merge begins anew.

    Args:
        command: The whole merge, which writes into `out`.
        out: The folder that it writes.
        kills: How many kills shall hit.
        seconds: That a whole merge takes from the beginning of writing to the last byte.
        expected: The digest of a merge that was not killed.
    """
    draw = random.Random(0)
    partial = out.with_name(f'.partial-{out.name}')
    hits, late, same = 0, 0, []
    while hits < kills:
        done = _finished(partial)
        if done > _ENOUGH:
            same.append(_complete(command, out, expected))
            done = 0.0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        while ' merging ' not in process.stderr.readline():
            pass
        moment = draw.uniform(0, (1 - done) * seconds)
        time.sleep(moment)
        running = process.poll() is None
        process.kill()
        process.communicate()
        if running and process.returncode == -signal.SIGKILL and not out.exists():
            hits += 1
            files = len(list(partial.glob('*.safetensors')))
            begun = sum(path.stat().st_blocks * 512 for path in partial.glob('*.part'))
            print(f'  kill {hits} after {moment:.2f} s of writing: {files} shards finished, {begun / 1e6:.0f} MB in '
                  f'unfinished ones, {_finished(partial):.0%} of the bytes to be kept', flush=True)  # fmt: skip
        else:
            late += 1
            same.append(digest(out) == expected)
            shutil.rmtree(out)
    same.append(_complete(command, out, expected))
    print(f'RESULT killed {hits} times while running ({late} more kills came after the end); same bytes as a merge '
          f'that was not killed: {sum(same)} of {len(same)} runs to the end', flush=True)  # fmt: skip


def _finished(partial: Path) -> float:
    """The share of the bytes that lie in finished shards."""
    files = list(partial.glob('*.safetensors'))
    if not files:
        return 0.0
    if (partial / 'model.safetensors.index.json').is_file():
        return 1.0
    total = int(files[0].stem.rpartition('-')[2])
    return len(files) / total


def _complete(command: Sequence[str], out: Path, expected: str) -> bool:
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    same = digest(out) == expected
    shutil.rmtree(out)
    return same
