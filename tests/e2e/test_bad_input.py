"""What is refused for more than a bad word in it; the table of those is `bad_calls.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import write_internlm
from xtuner.cli.main import main

FLAGSHIP = 'internlm_7b_qlora_oasst1'
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


class Place:
    """A folder with a good model and good data, for a test to spoil one thing of."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, folder / 'model'
        shutil.copytree(model, self.model)
        self.data = folder / 'data.jsonl'
        self.data.write_text(GOOD * 8, encoding='utf-8')
        self.work_dir = folder / 'run'

    def train(self, *options: str, config: str = FLAGSHIP) -> int:
        return main(['train', config, '--model', str(self.model), '--data', str(self.data), '--max-steps', '1',
                     '--work-dir', str(self.work_dir), '--cfg-options', 'dataset.max_length=64', 'adapter.r=2',
                     'schedule.accumulative_counts=1', 'samples.prompts=[]', *options])  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, tiny_internlm: Path) -> Place:
    return Place(tmp_path, tiny_internlm)


def cut(name: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.folder / name
        path.write_bytes(path.read_bytes()[:-1000])

    return spoil


@pytest.mark.usefixtures('no_network')
def test_no_network_and_no_local_model(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['train', FLAGSHIP, '--data', str(place.data), '--work-dir', str(place.work_dir)]) == 1
    assert 'internlm/internlm-7b' in capsys.readouterr().err
    assert not place.work_dir.exists()


def test_a_work_folder_that_holds_a_run_is_not_overwritten(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.train() == 0
    before = sorted((p.name, p.stat().st_mtime_ns) for p in place.work_dir.iterdir())
    assert place.train() == 1
    assert 'already contains checkpoints; add --resume' in capsys.readouterr().err
    assert sorted((p.name, p.stat().st_mtime_ns) for p in place.work_dir.iterdir()) == before


def test_merge_refuses_what_it_should(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.train() == 0
    adapter = place.work_dir / 'checkpoint-00000001'
    other = write_internlm(tmp_path / 'other', vocab_size=800, seed=7)
    out = tmp_path / 'out'

    def merge(base: Path, adapter: Path, out: Path) -> str:
        assert main(['convert', 'merge', str(base), str(adapter), str(out)]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert 'was trained on another base' in merge(other, adapter, out)
    assert 'no adapter found' in merge(place.model, tmp_path / 'nothing', out)
    assert not out.exists()
    out.mkdir()
    (out / 'precious.txt').write_text('mine', encoding='utf-8')
    assert 'is not empty; nothing was written' in merge(place.model, adapter, out)
    assert [p.name for p in out.iterdir()] == ['precious.txt']
    cut('run/checkpoint-00000001/adapter_model.safetensors')(place)
    assert 'is damaged or truncated' in merge(place.model, adapter, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_chat_refuses_an_adapter_of_another_base(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.train() == 0
    other = write_internlm(tmp_path / 'other', vocab_size=800, seed=7)
    assert main(['chat', str(other), '--adapter', str(place.work_dir / 'checkpoint-00000001')]) == 1
    assert 'was trained on another base' in capsys.readouterr().err


def test_four_bits_where_bitsandbytes_cannot_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bitsandbytes.functional

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError('no kernel image is available')

    monkeypatch.setattr(bitsandbytes.functional, 'quantize_4bit', broken)
    monkeypatch.setattr('bitsandbytes.nn.modules.bnb.functional.quantize_4bit', broken)
    assert place.train() == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'bitsandbytes' in error
    assert 'unexpected' not in error
    assert not place.work_dir.exists()
