"""A merge that is killed leaves nothing that looks finished, and ends with the same bytes when it is run again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.convert.adapters import make_base, save_trained
from xtuner.convert import shards
from xtuner.convert.merge import merge
from xtuner.convert.shards import TensorPlan, write_weights
from xtuner.convert.source import MergeSource
from xtuner.errors import ModelError
from xtuner.model.weights import blocks as weight_blocks
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.reader import open_weights

# The merge as the command runs it, with blocks so small and slow that a signal falls between any two of them.
SLOW = """
import os
import sys
import time
from xtuner.convert import shards
from xtuner.model.weights import blocks
blocks.BLOCK_ELEMENTS = 2000
as_bytes = shards._bytes
def slowly(block):
    os.write(1, b'writing\\n')  # one piece, whatever the other threads write
    time.sleep(0.005)
    return as_bytes(block)
shards._bytes = slowly
from xtuner.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / 'base')
    save_trained(base, tmp_path / 'adapter')
    words = ['convert', 'merge', str(base), str(tmp_path / 'adapter'), '--max-shard-size', '30KB', '--verify', '0']
    command = [sys.executable, '-c', SLOW, *words]
    monkeypatch.setattr(weight_blocks, 'BLOCK_ELEMENTS', 2000)
    merge(str(base), tmp_path / 'adapter', tmp_path / 'whole', max_shard_bytes=30_000, verify=0)
    out, partial = tmp_path / 'out', tmp_path / '.partial-out'
    with subprocess.Popen(
        [*command, str(out)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline() and not list(partial.glob('*.safetensors')):  # a line for each block
            pass
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert not (partial / 'model.safetensors.index.json').exists()
    finished = list(partial.glob('*.safetensors'))
    assert finished
    before = {path.name: path.stat().st_mtime_ns for path in finished}
    merge(str(base), tmp_path / 'adapter', out, max_shard_bytes=30_000, verify=0)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before, 'a finished shard was written again'
    assert files(out) == files(tmp_path / 'whole')
    assert not partial.exists()


def test_what_an_interrupted_merge_wrote_is_not_counted_as_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base(tmp_path / 'base')
    save_trained(base, tmp_path / 'adapter')
    merged = MergeSource.merged

    def refused(source: MergeSource, plan: TensorPlan) -> Iterator[torch.Tensor]:
        if plan.name.startswith('model.norm'):  # the last one in the base's files
            raise OSError('no space left')
        return merged(source, plan)

    for number, blocks in enumerate((refused, merged)):
        monkeypatch.setattr(MergeSource, 'merged', blocks)
        with (
            caplog.at_level('INFO', logger='xtuner'),
            nullcontext() if number else pytest.raises(ModelError, match='the same command resumes it'),
        ):
            merge(str(base), tmp_path / 'adapter', tmp_path / 'out', max_shard_bytes=30_000, verify=0)
    found = re.search(r'wrote (\d+) of the 14 .* changed is unknown; of the other (\d+), (\d+) changed', caplog.text)
    assert found
    before, written, changed = map(int, found.groups())
    assert before > 0
    assert written == changed == 14 - before
    assert ' tensors of 29 changed' not in caplog.text


def content(plan: TensorPlan) -> torch.Tensor:
    return torch.arange(torch.Size(plan.shape).numel()).reshape(plan.shape).to(plan.dtype)


def write(folder: Path, plans: list[TensorPlan], stop_at: str = '') -> None:
    def blocks(plan: TensorPlan) -> list[torch.Tensor]:
        if plan.name == stop_at:
            raise OSError('no space left')
        whole = content(plan)
        return [whole[a:b] if plan.shape else whole for a, b in row_blocks(plan.shape)]

    write_weights(folder, plans, 100, blocks)


PLANS = [
    TensorPlan('a', (4, 3), torch.float32),
    TensorPlan('b', (5,), torch.bfloat16),
    TensorPlan('c', (), torch.int64),
    TensorPlan('d', (70, 2), torch.float16),
    TensorPlan('none', (0, 3), torch.float16),
]


def test_shards_are_read_by_others_and_hold_what_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.setattr(weight_blocks, 'BLOCK_ELEMENTS', 7)
    write(tmp_path, PLANS)
    reader = open_weights(tmp_path)
    assert sorted(reader.names()) == ['a', 'b', 'c', 'd', 'none']
    held = {name: tensor for file in tmp_path.glob('*.safetensors') for name, tensor in load_file(file).items()}
    for plan in PLANS:
        assert held[plan.name].dtype == plan.dtype
        assert torch.equal(held[plan.name], content(plan))
        assert torch.equal(reader.rows(plan.name), held[plan.name])
    sizes = [sum(load_file(file)[n].nbytes for n in load_file(file)) for file in tmp_path.glob('*.safetensors')]
    assert sorted(sizes) == [0, 66, 280]  # a, b and c fit into 100 bytes; d alone is larger


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 100}))
    with pytest.raises(ModelError, match=r'B free but .* are needed'):
        write(tmp_path, PLANS)
    assert not list(tmp_path.iterdir())
