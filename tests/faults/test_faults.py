"""The fault list: each tried for real. What is lost is never more than the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.lives import metrics, newest, result, words_for
from xtuner.cli.main import main
from xtuner.engine.checkpoint.trainer_state import read_state, validation_loss
from xtuner.errors import TrainingError
from xtuner.utils.jsonl import append_line

STEPS = 5
SAMPLES = ['samples.prompts=["Say 1.", "Say 2."]', 'samples.interval=1', 'samples.max_new_tokens=3']


class Place:
    """A model, conversations, and trainings on them."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder, model, data

    def train(self, *options: str, name: str = 'run', steps: int = STEPS, words: tuple[str, ...] = ()) -> int:
        line = words_for(self.model, self.data, self.folder / name, *options, steps=steps)
        return main([line[0], *words, *line[1:]])

    def whole(self, *options: str) -> dict[str, Any]:
        """What a run ends with that nothing happens to."""
        if not (self.folder / 'whole').exists():
            assert self.train(*options, name='whole') == 0
        return result(self.folder / 'whole')

    def goes_on(self, *options: str) -> None:
        """The same command, without the hook that was the fault, ends with the same bytes."""
        assert self.train(*options, words=('--allow-changes',)) == 0
        assert result(self.folder / 'run') == self.whole(*options)

    def checkpoints(self) -> list[int]:
        return sorted(int(p.name[11:]) for p in (self.folder / 'run').glob('checkpoint-*'))


@pytest.fixture
def place(tmp_path: Path, tiny_internlm: Path, forty_conversations: Path) -> Place:
    return Place(tmp_path, tiny_internlm, forty_conversations)


@pytest.fixture
def error(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The one line of error since the last call."""

    def read() -> str:
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('xtuner: error: ')]
        assert len(lines) == 1
        assert 'unexpected' not in lines[0].replace('exited unexpectedly', '')  # torch's words of a worker
        return lines[0]

    return read


def fault(name: str, step: int = 3, **values: Any) -> str:
    return 'hooks=' + repr([{'type': f'tests.faults.hooks:{name}', 'step': step, **values}])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts a tmpfs of so many MiB, perhaps read-only."""
    mounted = []

    def mount(mib: int, options: str = '') -> Path:
        folder = tmp_path / 'disk'
        folder.mkdir()
        command = ['mount', '-t', 'tmpfs', '-o', f'size={mib}m{options}', 'tmpfs', str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip('a file system can be mounted by root only, and not in every container')
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(['umount', str(folder)], check=True)


def on_disk(place: Place, disk: Path) -> None:
    place.folder = disk


def test_a_disk_too_small_is_known_before_the_run(place: Place, small_disk: Any, error: Any) -> None:
    on_disk(place, small_disk(12))
    assert place.train() == 1
    assert 'MiB free, but 3 checkpoints need up to' in error()
    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize(
    ('free', 'checked'),
    [(2**20, True), (100_000, False), pytest.param(2**15, False, marks=pytest.mark.slow), (2**12, False)],
)
def test_a_disk_that_fills_up(
    free: int, checked: bool, place: Place, small_disk: Any, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the check before the save, and where another program takes the room after it."""
    expected = place.whole()
    on_disk(place, small_disk(32))
    if not checked:
        monkeypatch.setattr('xtuner.engine.hooks.checkpoint.check_space', lambda *_: None)
    assert place.train(fault('FillDisk', free=free)) == 1
    text = error()
    assert 'the checkpoint of step 3 would need' in text if checked else 'No space left on device' in text
    assert place.checkpoints()[-1] == 2
    assert not list((place.folder / 'run').glob('.*'))
    (place.folder / 'filler').unlink()
    assert place.train(words=('--allow-changes',)) == 0
    assert result(place.folder / 'run') == expected


@pytest.mark.parametrize('tracker', ['[]', '["tensorboard"]'])
def test_a_disk_without_a_byte_left(
    tracker: str, place: Place, small_disk: Any, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file it is that cannot be written first."""
    on_disk(place, small_disk(32))
    monkeypatch.setattr('xtuner.engine.hooks.checkpoint.check_space', lambda *_: None)
    options = [f'log.trackers={tracker}', 'checkpoint.interval=4', *SAMPLES]
    assert place.train(fault('FillDisk', step=2, free=0), *options, steps=40) == 1
    assert 'No space left on device' in error()
    assert not list((place.folder / 'run').glob('.*'))
    (place.folder / 'filler').unlink()
    assert place.train(*options, steps=40, words=('--allow-changes',)) == 0


def test_a_loss_log_that_cannot_be_written(small_disk: Any) -> None:
    disk = small_disk(1)
    (disk / 'filler').write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises(TrainingError, match=r'cannot write .*metrics.jsonl: No space left on device'):
        append_line(disk / 'metrics.jsonl', {'step': 1})


def test_a_folder_that_cannot_be_written(place: Place, small_disk: Any, error: Any) -> None:
    on_disk(place, small_disk(32, ',ro'))
    assert place.train() == 1
    assert 'cannot write to' in error()


def test_the_cache_is_deleted(place: Place) -> None:
    assert place.train(steps=STEPS) == 0
    shutil.rmtree(place.folder / 'run' / 'checkpoint-00000005')
    shutil.rmtree(os.environ['XTUNER_CACHE'])
    place.goes_on()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILES = ('adapter_model.safetensors', 'trainer.safetensors', 'trainer.json', 'manifest.json')
HARMS = list(product(FILES, (cut, flip, Path.unlink)))


@pytest.mark.parametrize(  # a third of them by default: each file, each harm
    ('name', 'harm'),
    [
        pytest.param(*pair, marks=[] if number in (0, 4, 8, 9) else pytest.mark.slow)
        for number, pair in enumerate(HARMS)
    ],
)
def test_a_checkpoint_is_torn(name: str, harm: Any, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.train() == 0
    harm(place.folder / 'run' / 'checkpoint-00000005' / name)
    capsys.readouterr()
    place.goes_on()
    err = capsys.readouterr().err
    assert 'skipping a checkpoint: ' in err
    assert 'resuming from' in err


def test_all_checkpoints_are_torn(place: Place, error: Any) -> None:
    assert place.train() == 0
    for folder in (place.folder / 'run').glob('checkpoint-*'):
        flip(folder / 'trainer.safetensors')
    assert place.train() == 1
    assert 'no complete checkpoint to resume from' in error()


def test_a_data_worker_is_killed(place: Place, error: Any) -> None:
    assert place.train('runtime.num_workers=1', fault('KillWorker')) == 1
    assert 'a DataLoader worker died' in error()
    assert place.checkpoints() in ([1, 2], [1, 2, 3])  # the step's batches may have been handed over already
    place.goes_on()


def test_the_clock_jumps(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, 'time', time.time)  # put back at the end
    assert place.train('hooks=[{"type": "tests.faults.hooks:JumpClock"}]') == 0
    lines = (place.folder / 'run' / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    assert all(0 < json.loads(line)['seconds'] < 60 for line in lines)
    assert result(place.folder / 'run') == place.whole()


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_ends_the_run(number: int, place: Place, error: Any) -> None:
    before = signal.getsignal(number)
    assert place.train(fault('Signal', numbers=[int(number)]), 'checkpoint.interval=100') == 128 + number
    assert 'stopped at step 2, saved; the same command with --resume continues' in error()
    assert place.checkpoints() == [2]
    assert signal.getsignal(number) is before
    place.goes_on()


LONG = ('schedule.accumulative_counts=12', 'checkpoint.interval=100')


@pytest.mark.parametrize('micro_batch', [1, 4, 11])
def test_a_signal_within_a_long_step_is_followed_before_the_next_micro_batch(
    micro_batch: int, place: Place, error: Any
) -> None:
    run = place.folder / 'run'
    slow = fault('SlowStep', step=2, micro_batch=micro_batch, rank=0, seconds=[0.02])
    assert place.train(slow, *LONG, steps=2) == 143
    assert 'stopped at step 1, saved; the same command with --resume continues' in error()
    assert (run / 'micro-batches-0').read_text(encoding='utf-8') == str(micro_batch)
    assert place.checkpoints() == [1]
    assert [entry['step'] for entry in metrics(run)] == [1]
    assert place.train(*LONG, words=('--allow-changes',), steps=2) == 0  # the hook is gone
    resumed = result(run)
    shutil.rmtree(run)
    assert place.train(*LONG, steps=2) == 0  # never interrupted
    assert resumed == result(run)


def test_a_signal_within_the_first_step_saves_nothing(place: Place, error: Any) -> None:
    slow = fault('SlowStep', step=1, micro_batch=3, rank=0, seconds=[0.02])
    assert place.train(slow, 'schedule.accumulative_counts=64') == 143
    assert 'stopped in the first step; nothing was trained or saved' in error()
    assert (place.folder / 'run' / 'micro-batches-0').read_text(encoding='utf-8') == '3'
    assert place.checkpoints() == []


def test_a_signal_in_a_long_step_after_a_saved_one_does_not_save_it_again(place: Place, error: Any) -> None:
    options = ('schedule.accumulative_counts=3', 'checkpoint.interval=1', 'dataset.val_ratio=0.1')
    assert place.train(fault('SlowStep', step=2, micro_batch=2, rank=0, seconds=[0.02]), *options) == 143
    assert 'stopped at step 1, saved' in error()
    loss = validation_loss(place.folder / 'run' / 'checkpoint-00000001')
    assert loss is not None and metrics(place.folder / 'run')[-1]['val_loss'] == loss


def test_a_second_signal_stops_at_once(place: Place, error: Any) -> None:
    assert place.train(fault('Signal', numbers=[int(signal.SIGTERM), int(signal.SIGTERM)])) == 143
    assert 'stopped at once; the last checkpoint is kept' in error()
    assert place.checkpoints() == [1, 2]
    place.goes_on()


def test_a_loss_that_is_not_a_number_is_skipped_and_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    options = fault('Poison', step=2, micro_batch=2)
    assert place.train(options) == 0
    err = capsys.readouterr().err
    [line] = [line for line in err.splitlines() if 'no weight was changed' in line]
    assert 'step 2: loss nan, gradient norm nan; no weight was changed (1 steps skipped so far, 1 in a row)' in line
    assert 'micro-batch 2: pack ' in line
    assert 'micro-batch 1' not in line
    assert 'conversations.jsonl:' in line
    log = metrics(place.folder / 'run')
    assert [entry['skipped'] for entry in log] == [False, True, False, False, False]
    assert [entry['num_skipped'] for entry in log] == [0, 1, 1, 1, 1]
    names = [place.folder / 'run' / f'checkpoint-0000000{step}' for step in (4, 5)]
    assert all(folder.is_dir() for folder in names)


def test_the_conversations_named_are_those_of_the_step(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """The message's pack, looked up in the prepared data, holds the ids that the step was given."""
    from xtuner.dataset.cache.store import PreparedDataset

    assert place.train(fault('Poison', step=3), steps=3) == 0
    err = capsys.readouterr().err
    line = next(line for line in err.splitlines() if 'no weight was changed' in line)
    pack = int(line.split('pack ')[1].split()[0])
    prepared = (Path(os.environ['XTUNER_CACHE']) / 'datasets').iterdir()
    [folder] = [path for path in prepared if path.is_dir()]  # beside it lies the file of its lock
    dataset = PreparedDataset(folder)
    origins = dataset.origins(pack)
    assert all(origin in line for origin in origins)
    lines = place.data.read_text(encoding='utf-8').splitlines()
    from xtuner.model.loading import load_tokenizer

    text = load_tokenizer(place.model).decode(dataset[pack]['input_ids'])
    for origin in origins:
        record = json.loads(lines[int(origin.rsplit(':', 1)[1]) - 1])
        assert record['messages'][0]['content'] in text


def test_too_many_in_a_row_end_the_run_across_a_resume(place: Place, error: Any) -> None:
    options = (fault('Poison', step=2, steps=9), 'runtime.max_nonfinite_steps=3')
    assert place.train(*options) == 1
    assert '3 steps in a row had no finite gradient (last: step 4' in error()
    assert place.checkpoints() == [3, 4]
    shutil.rmtree(place.folder / 'run' / 'checkpoint-00000004')
    assert place.train(*options) == 1  # counts on from two
    assert '3 steps in a row had no finite gradient (last: step 4' in error()


def test_out_of_memory_says_what_takes_it(place: Place, error: Any) -> None:
    assert place.train(fault('RunOut')) == 1
    text = error()
    for part in ('step 3: out of memory on cpu with micro-batches of 1 x ', 'largest: base weights',
                 'dataset.max_length=24 saves', 'the batch: micro-batch 1: pack '):  # fmt: skip
        assert part in text
    assert place.checkpoints() == [1, 2]
    place.goes_on()


def test_a_micro_batch_without_a_target_is_named(place: Place, error: Any) -> None:
    assert place.train(fault('Mask')) == 1
    text = error()
    assert 'step 3: every token of pack ' in text
    assert 'conversations.jsonl:' in text


def test_an_adapter_without_a_gradient_is_named(place: Place, error: Any) -> None:
    assert place.train(fault('Detach', step=1)) == 1
    assert 'step 1: no gradient for ' in (text := error())
    assert 'layers.1.self_attn.q_proj:' in text
    assert 'k_proj' not in text
    assert place.checkpoints() == []


def test_samples_change_nothing(place: Place) -> None:
    assert place.train(*SAMPLES) == 0
    place.goes_on()
    answers = (place.folder / 'run' / 'samples.jsonl').read_text(encoding='utf-8').splitlines()
    assert [json.loads(line)['step'] for line in answers] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


SLOW_KINDS = (RuntimeError, torch.OutOfMemoryError, OSError, AssertionError)


@pytest.mark.parametrize('kind', [KeyError, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW_KINDS)])
def test_samples_that_fail_change_nothing(
    kind: type[Exception], place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = place.whole()

    def fail(llm: Any, *_: Any, **__: Any) -> None:
        torch.manual_seed(0)
        llm.train()
        raise kind('no sample')

    monkeypatch.setattr('xtuner.engine.hooks.evaluate_chat.generate', fail)
    assert place.train(*SAMPLES) == 0
    assert result(place.folder / 'run') == expected
    assert capsys.readouterr().err.count('training continues: ') == STEPS + 1


def test_a_resumed_run_writes_each_answer_once(place: Place) -> None:
    assert place.train(*SAMPLES, name='whole') == 0
    assert place.train(*SAMPLES) == 0
    shutil.rmtree(place.folder / 'run' / 'checkpoint-00000005')
    place.goes_on(*SAMPLES)
    logs = [(place.folder / name / 'samples.jsonl').read_bytes() for name in ('whole', 'run')]
    assert logs[0] == logs[1]


def test_a_loss_log_that_is_torn_is_mended(place: Place) -> None:
    assert place.train() == 0
    shutil.rmtree(place.folder / 'run' / 'checkpoint-00000005')
    cut(place.folder / 'run' / 'metrics.jsonl')
    place.goes_on()


def test_a_resumed_run_recomputes_the_same_layers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` decides by the free memory; on a GPU, recomputing a layer changes the last bits."""
    budget, auto = 'xtuner.fused.recompute.activation_budget_bytes', 'runtime.activation_checkpointing=auto'
    with monkeypatch.context() as patch:
        patch.setattr(budget, lambda *_: 0)
        place.whole(auto)
        assert place.train(auto) == 0
    shutil.rmtree(place.folder / 'run' / 'checkpoint-00000005')
    place.goes_on(auto)
    assert place.train(auto, name='other') == 0
    rooms = [read_state(place.folder / run / 'checkpoint-00000005')['activation_rooms'] for run in ('run', 'other')]
    assert rooms[0] == [0] != rooms[1]


def test_the_newest_is_named_by_last(place: Place) -> None:
    assert place.train() == 0
    (place.folder / 'run' / 'last').write_text('checkpoint-00000004\n', encoding='utf-8')  # killed just before
    assert place.train() == 0
    assert newest(place.folder / 'run').name == 'checkpoint-00000005'
