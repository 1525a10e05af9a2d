"""A merge that is killed leaves nothing that looks finished, and ends with the same bytes when it is run again."""

from __future__ import annotations

import json
import os
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
from xtuner.convert.output import atomic_folder
from xtuner.convert.shards import TensorPlan, write_weights
from xtuner.convert.source import MergeSource
from xtuner.errors import CheckpointError, ModelError
from xtuner.model.weights import blocks as weight_blocks
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.reader import open_weights
from xtuner.utils import locks

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


def test_where_the_disk_refuses_the_work_is_kept_and_where_the_input_is_wrong_it_is_not(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with (
        pytest.raises(ModelError, match=r'no space left.*the same command resumes it'),
        atomic_folder(out, 1) as folder,
    ):
        write(folder, PLANS, stop_at='d')
    assert [p.name for p in (tmp_path / '.partial-out').glob('*.safetensors')] == ['model-00001-of-00003.safetensors']
    with pytest.raises(CheckpointError), atomic_folder(out, 1):
        raise CheckpointError('wrong')
    assert not list(tmp_path.iterdir())


def test_another_job_does_not_go_on_with_it(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with pytest.raises(ModelError), atomic_folder(out, 'fp16') as folder:
        write(folder, PLANS, stop_at='d')
    with atomic_folder(out, 'bf16') as folder:
        assert not list(folder.glob('*.safetensors'))
        write(folder, PLANS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out']


def test_a_disk_that_is_too_small_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 100}))
    with pytest.raises(ModelError, match=r'B free but .* are needed'):
        write(tmp_path, PLANS)
    assert not list(tmp_path.iterdir())


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    out = tmp_path / 'out'
    with atomic_folder(out, 'job') as folder:
        (folder / 'half').write_text('done')
        with pytest.raises(ModelError, match='out is being written by another process'), atomic_folder(out, 'job'):
            pass
        assert (folder / 'half').read_text() == 'done'
    assert [path.name for path in tmp_path.iterdir()] == ['out']
    assert (out / 'half').read_text() == 'done'


def test_the_lock_is_closed_before_it_is_removed_where_open_files_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlink = Path.unlink

    def unlink_as_windows(path: Path, missing_ok: bool = False) -> None:
        links = list(Path('/proc/self/fd').iterdir())
        if any(os.path.realpath(link) == str(path) for link in links):
            raise PermissionError(13, 'in use', str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(locks, 'fcntl', None)
    monkeypatch.setattr(Path, 'unlink', unlink_as_windows)
    with atomic_folder(tmp_path / 'out', 'job') as folder:
        (folder / 'file').write_text('done')
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_where_nothing_can_be_written_nothing_is_said_to_be_kept(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    below = atomic_folder(tmp_path / 'file' / 'a', 'job')
    with pytest.raises(ModelError, match=r'file is a file; nothing was written'), below:
        pass
    with (
        pytest.raises(ModelError, match=r'cannot write .*: .*; nothing was written$'),
        atomic_folder(Path('/proc/self/nothing/out'), 'job'),
    ):
        pass


def test_a_broken_file_of_the_base_is_found_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtuner.convert import merge as module

    base = make_base(tmp_path / 'base')
    save_trained(base, tmp_path / 'adapter')
    (base / 'generation_config.json').write_text('{')
    written: list[Path] = []
    monkeypatch.setattr(module, 'write_weights', lambda folder, *_: written.append(folder))
    with pytest.raises(ModelError, match=r'generation_config.json cannot be read'):
        merge(str(base), tmp_path / 'adapter', tmp_path / 'out', verify=0)
    assert not written
    assert not (tmp_path / 'out').exists()


def test_a_base_that_is_stored_quantised_is_told_as_such(tmp_path: Path) -> None:
    base = make_base(tmp_path / 'base')
    save_trained(base, tmp_path / 'adapter')
    config = json.loads((base / 'config.json').read_text())
    config['quantization_config'] = {'quant_method': 'bitsandbytes', 'load_in_4bit': True}
    (base / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r'is stored quantized \(bitsandbytes\), but a merge needs float weights'):
        merge(str(base), tmp_path / 'adapter', tmp_path / 'out')
