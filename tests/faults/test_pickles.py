"""A pickle that runs a program when it is read, in place of each file that we read: nothing runs it."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.lives import words_for
from xtuner.cli.main import main


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def in_pickle(bomb: Bomb) -> bytes:
    return pickle.dumps(bomb)


def in_torch_file(bomb: Bomb) -> bytes:
    """As `torch.save` writes it now."""
    file = io.BytesIO()
    torch.save({'weight': bomb}, file)
    return file.getvalue()


def in_old_torch_file(bomb: Bomb) -> bytes:
    """As torch before 1.6 wrote it."""
    file = io.BytesIO()
    torch.save({'weight': bomb}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def in_numpy_file(bomb: Bomb) -> bytes:
    """An array of objects, which numpy pickles."""
    import numpy as np

    file = io.BytesIO()
    array = np.empty(1, dtype=object)
    array[0] = bomb
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


FORMS: list[Callable[[Bomb], bytes]] = [in_pickle, in_torch_file, in_old_torch_file, in_numpy_file]


@pytest.fixture
def bomb(tmp_path: Path) -> Bomb:
    return Bomb(tmp_path / 'executed')


@pytest.mark.parametrize('form', FORMS)
def test_the_bombs_go_off_where_they_are_unpickled(form: Callable[[Bomb], bytes], bomb: Bomb) -> None:
    """Or else the other tests would show nothing."""
    import numpy as np

    content = io.BytesIO(form(bomb))
    if form is in_pickle:
        pickle.load(content)
    elif form is in_numpy_file:
        np.load(content, allow_pickle=True)
    else:
        torch.load(content, weights_only=False)
    assert bomb.marker.exists()


@pytest.fixture(scope='module')
def run_before(tiny_internlm: Path, forty_conversations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a cache of prepared data, and two checkpoints, all for copies to be spoilt."""
    folder = tmp_path_factory.mktemp('before')
    shutil.copytree(tiny_internlm, folder / 'model')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('XTUNER_CACHE', str(folder / 'cache'))
        assert main(words_for(folder / 'model', forty_conversations, folder / 'run', steps=2)) == 0
    return folder


@pytest.fixture
def place(run_before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(run_before, tmp_path / 'place')
    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path / 'place' / 'cache'))
    return tmp_path / 'place'


def files_of(folder: Path, below: str) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in (folder / below).rglob('*') if p.is_file())


def spoil_and_run(place: Path, names: list[str], bomb: Bomb, form: Callable[[Bomb], bytes], words: list[str]) -> None:
    """Each file in turn, the others whole; then what is not ours to change is put back."""
    for name in names:
        before = (place / name).read_bytes()
        stat = (place / name).stat()
        (place / name).write_bytes(form(bomb)[: stat.st_size].ljust(stat.st_size, b'\0') if '.npy' in name else
                                   form(bomb))  # fmt: skip
        status = main(words)
        assert status in (0, 1), name
        assert not bomb.marker.exists(), f'{name} was executed'
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(before)


def no_traceback(err: str) -> None:
    assert 'Traceback' not in err
    assert 'unexpected' not in err


def test_in_each_file_of_a_checkpoint_that_is_resumed(
    place: Path, forty_conversations: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(place / 'model', forty_conversations, place / 'run', steps=2)
    names = files_of(place, 'run/checkpoint-00000002')
    assert len(names) > 8
    spoil_and_run(place, names, bomb, in_torch_file, words)
    no_traceback(capsys.readouterr().err)


def test_in_each_file_of_a_checkpoint_whose_manifest_fits(
    place: Path, forty_conversations: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever can put a bomb there can write a manifest."""
    words = words_for(place / 'model', forty_conversations, place / 'run', steps=3)
    folder = place / 'run' / 'checkpoint-00000002'
    from xtuner.engine.checkpoint import store

    for name in files_of(place, 'run/checkpoint-00000002'):
        before = (place / name).read_bytes()
        (place / name).write_bytes(in_torch_file(bomb))
        (folder / 'manifest.json').unlink()
        store._write_manifest(folder)
        assert main(words) in (0, 1), name
        assert not bomb.marker.exists(), f'{name} was executed'
        (place / name).write_bytes(before)
        shutil.rmtree(place / 'run' / 'checkpoint-00000003', ignore_errors=True)
    no_traceback(capsys.readouterr().err)


def test_in_each_file_of_the_model(
    place: Path, forty_conversations: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in files_of(place, 'model'):
        before = (place / name).read_bytes()
        (place / name).write_bytes(in_torch_file(bomb))
        words = words_for(place / 'model', forty_conversations, place / 'new', steps=1)
        main(words)
        assert not bomb.marker.exists(), f'{name} was executed'
        (place / name).write_bytes(before)
        shutil.rmtree(place / 'new', ignore_errors=True)
    no_traceback(capsys.readouterr().err)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('sharded', [False, True])
def test_in_weights_as_bin(
    form: Callable[[Bomb], bytes], sharded: bool, place: Path, forty_conversations: Path, bomb: Bomb,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (place / 'model' / 'model.safetensors').unlink()
    name = 'pytorch_model-00001-of-00001.bin' if sharded else 'pytorch_model.bin'
    (place / 'model' / name).write_bytes(form(bomb))
    if sharded:
        (place / 'model' / 'pytorch_model.bin.index.json').write_text(
            '{"weight_map": {"model.embed_tokens.weight": "' + name + '"}}', encoding='utf-8'
        )
    assert main(words_for(place / 'model', forty_conversations, place / 'new', steps=1)) == 1
    assert not bomb.marker.exists()
    err = capsys.readouterr().err
    assert name in err
    no_traceback(err)


def test_in_each_file_of_the_cache(
    place: Path, forty_conversations: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(place / 'model', forty_conversations, place / 'run', steps=2)
    names = files_of(place, 'cache')
    assert len(names) > 5
    spoil_and_run(place, names, bomb, in_numpy_file, words)
    no_traceback(capsys.readouterr().err)


@pytest.mark.parametrize('name', ['adapter_model.safetensors', 'adapter_model.bin', 'adapter_config.json'])
@pytest.mark.parametrize('alone', [True, False])
def test_in_an_adapter_that_is_chatted_with_merged_or_begun_with(
    name: str, alone: bool, place: Path, forty_conversations: Path, bomb: Bomb, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter, model = place / 'run' / 'checkpoint-00000002', place / 'model'
    (adapter / 'manifest.json').unlink()
    if alone and name.endswith('.bin'):
        (adapter / 'adapter_model.safetensors').unlink()
    (adapter / name).write_bytes(in_torch_file(bomb))
    monkeypatch.setattr('sys.stdin', io.StringIO('Hello\n'))
    new = [word for word in words_for(model, forty_conversations, tmp_path / 'new', steps=1) if word != '--resume']
    for words in (['chat', str(model), '--adapter', str(adapter), '--max-new-tokens', '2'],
                  ['convert', 'merge', str(model), str(adapter), str(tmp_path / 'merged')],
                  [new[0], '--start-from', str(adapter), *new[1:]]):  # fmt: skip
        assert main(words) in ((0, 1) if name.endswith('.bin') and not alone else (1,)), words
        assert not bomb.marker.exists(), words
    no_traceback(capsys.readouterr().err)


@pytest.mark.parametrize('suffix', ['pth', 'pt', 'pkl', 'bin', 'jsonl', 'json', 'csv', 'parquet', 'arrow', 'txt'])
def test_in_the_data(
    suffix: str, place: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str], forms: Any = (in_torch_file, in_pickle)
) -> None:
    for form in forms:
        data = place / f'data.{suffix}'
        data.write_bytes(form(bomb))
        main(words_for(place / 'model', data, place / 'new', steps=1))
        assert not bomb.marker.exists()
    assert not (place / 'new').exists()
    no_traceback(capsys.readouterr().err)


def test_in_a_pth_that_is_resumed_or_begun_with(
    place: Path, forty_conversations: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    """mmengine's own form of a checkpoint, and its own way to read it."""
    from xtuner.engine.runner import Runner
    from xtuner.errors import CheckpointError

    (place / 'iter_2.pth').write_bytes(in_torch_file(bomb))
    words = [w for w in words_for(place / 'model', forty_conversations, place / 'new', steps=1) if w != '--resume']
    assert main([words[0], '--resume', str(place / 'iter_2.pth'), *words[1:]]) == 1
    assert main([words[0], '--start-from', str(place / 'iter_2.pth'), *words[1:]]) == 1
    no_traceback(capsys.readouterr().err)
    for read in (Runner.resume, Runner.load_checkpoint):
        with pytest.raises(CheckpointError, match='mmengine resumes from pickles'):
            read(object(), str(place / 'iter_2.pth'))  # type: ignore[arg-type]
    assert not bomb.marker.exists()
    assert os.listdir(place)
