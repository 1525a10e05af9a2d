"""Bad input gets one clear line, exit status 1 or 2, and leaves nothing behind."""

from __future__ import annotations

import json
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


def replace(name: str, content: str | bytes) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def remove(*names: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        for name in names:
            path = place.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def cut(name: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.folder / name
        path.write_bytes(path.read_bytes()[:-1000])

    return spoil


def edit_config(**values: object) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.model / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text(encoding='utf-8')) | values), encoding='utf-8')

    return spoil


BAD = {
    'data missing': (remove('data.jsonl'), 'data.jsonl'),
    'data empty': (replace('data.jsonl', ''), 'data.jsonl'),
    'data malformed': (replace('data.jsonl', GOOD + '{"messages": [\n'), 'data.jsonl:2'),
    'data not UTF-8': (replace('data.jsonl', GOOD.encode() + b'\xff\xfe{}\n'), 'data.jsonl:2'),
    'data of unknown columns': (replace('data.jsonl', '{"question_zh": "a", "reply": "b"}\n'), 'question_zh'),
    'data with an unknown role': (replace('data.jsonl', GOOD.replace('user', 'usr')), 'data.jsonl:1'),
    'data with nothing to train': (replace('data.jsonl', GOOD.replace(', {"role": "assistant", "content": "b"}', '')),
                                   'data.jsonl'),
    'model missing': (remove('model'), 'model'),
    'model without weights': (remove('model/model.safetensors'), 'weights'),
    'model without tokenizer': (remove('model/tokenizer.model', 'model/tokenizer_config.json'), 'tokenizer'),
    'model without config': (remove('model/config.json'), 'config.json'),
    'weights cut off': (cut('model/model.safetensors'), 'model.safetensors'),
    'a tokenizer that is none': (replace('model/tokenizer.model', 'no model'), 'tokenizer.model'),
    'a config that is none': (replace('model/config.json', '{'), 'config.json'),
    'weights of another shape': (edit_config(intermediate_size=96), 'mlp'),
    'more layers than weights': (edit_config(num_hidden_layers=3), 'layers.2'),
    'fewer layers than weights': (edit_config(num_hidden_layers=1), 'layers.1'),
    'an unknown kind of model': (edit_config(model_type='nonesuch'), 'nonesuch'),
}  # fmt: skip


@pytest.mark.usefixtures('no_network')
@pytest.mark.parametrize('case', sorted(BAD))
def test_bad_data_or_model(case: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BAD[case]
    spoil(place)
    assert place.train() == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith('xtuner: error: ')]
    assert len(errors) == 1
    assert message in errors[0]
    assert 'unexpected' not in errors[0]
    assert 'Traceback' not in errors[0]
    assert not place.work_dir.exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['adapter.target_modules=["no_such_layer"]'], 'no_such_layer'),
        (['adapter.lora_alfa=8'], "did you mean 'lora_alpha'"),
        (['adapter.r=0'], 'adapter'),
        (['optimizer.type=torch.optim:AdamZ'], 'AdamZ'),
        (['optimizer.learning_rate=1'], 'optimizer.learning_rate'),
        (['model.template=internlm_chatt'], "did you mean 'internlm_chat'"),
        (['model.dtype=fp16'], 'model.dtype'),
        (['dataset.map_fn=alpacca'], "did you mean 'alpaca'"),
        (['dataset.map_fn=alpaca'], 'data.jsonl:1'),
        (['hooks=[{"type": "nowhere:Hook"}]'], 'nowhere'),
        (['log.trackers=["wandb"]'], "pip install 'xtuner[trackers]'"),
    ],
)
def test_a_bad_value(options: list[str], message: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.train(*options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('xtuner: error: ')
    assert message in error
    assert 'unexpected' not in error
    assert not place.work_dir.exists()


@pytest.mark.usefixtures('no_network')
def test_no_network_and_no_local_model(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['train', FLAGSHIP, '--data', str(place.data), '--work-dir', str(place.work_dir)]) == 1
    assert 'internlm/internlm-7b' in capsys.readouterr().err
    assert not place.work_dir.exists()


def test_a_work_folder_that_holds_a_run_is_not_overwritten(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.train() == 0
    before = sorted((p.name, p.stat().st_mtime_ns) for p in place.work_dir.iterdir())
    assert place.train() == 1
    assert 'already holds checkpoints; add --resume' in capsys.readouterr().err
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
    assert 'no adapter there' in merge(place.model, tmp_path / 'nothing', out)
    assert 'did you mean' in merge(place.model, place.work_dir, out)
    assert not out.exists()
    out.mkdir()
    (out / 'precious.txt').write_text('mine', encoding='utf-8')
    assert 'is not empty; nothing was written' in merge(place.model, adapter, out)
    assert [p.name for p in out.iterdir()] == ['precious.txt']
    cut('run/checkpoint-00000001/adapter_model.safetensors')(place)
    assert 'cannot be read' in merge(place.model, adapter, tmp_path / 'new')
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
