"""An adapter loads whole or not at all: what peft would pass over in silence is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert.adapters import VOCAB, make_base, save_trained
from xtuner.adapters import load, settings
from xtuner.adapters.load import load_adapter
from xtuner.cli.main import main
from xtuner.convert.base import skeleton
from xtuner.errors import CheckpointError
from xtuner.model.loading import load_model

IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
FILE = 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A LoRA with a module that was trained whole, and the logits of the model that saved it."""
    folder = tmp_path_factory.mktemp('adapter')
    adapted = save_trained(base, folder, modules_to_save=['lm_head'])
    return folder, logits(adapted)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rewritten(source: Path, to: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(source, to)
    save_file(change(load_file(to / FILE)), to / FILE)
    return to


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new, 1): value for key, value in tensors.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


def with_tensor(key: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {PREFIX + key: torch.ones(shape)}


Q = 'model.layers.0.self_attn.q_proj'
# What is wrong -> how the file gets so, and a part of the message.
WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    'other names': (renamed('lora_A', 'lora_down'), r'14 of its 29 tensors do not match it, such as .*lora_down'),
    'another name kept': (renamed('lora_A.weight', 'lora_A.mine.weight'), '14 of its 29 tensors do not match'),
    'no prefix': (renamed(PREFIX, ''), "is incomplete: 'base_model.model.lm_head.weight' is not in its file"),
    'a wrapper that is not known': (renamed('model.layers', 'wrapped.model.layers'), '28 of its 29 tensors'),
    'half of it': (without('.layers.1.'), '14 of the 28 tensors that its adapter_config.json requires are not in its'),
    'one factor': (without(f'{Q}.lora_B'), r'1 of the 28 tensors .* such as .*q_proj.lora_B'),
    'no whole module': (without('lm_head'), "'base_model.model.lm_head.weight' is not in its file"),
    'a layer too many': (with_tensor('model.layers.9.mlp.up_proj.lora_A.weight', 4, 64), '1 of its 30 tensors'),
    'another width': (with_tensor(f'{Q}.lora_A.weight', 4, 65), r'q_proj.lora_A\S+ is \[4, 65\] in its file but'),
    'another rank': (with_tensor(f'{Q}.lora_B.weight', 64, 5), r'is \[64, 5\] in its file but \[64, 4\] in the'),
    "the base's own weight": (with_tensor(f'{Q}.base_layer.weight', 64, 64), 'a tensor of the base'),
    'nothing': (lambda _: {}, 'contains no tensor'),
}  # fmt: skip


@pytest.mark.parametrize('kind', WRONG)
def test_what_is_wrong_is_one_line_on_a_model_and_on_a_skeleton(
    kind: str, base: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    change, message = WRONG[kind]
    folder = rewritten(saved[0], tmp_path / 'adapter', change)
    for model in (load_model(base, dtype=torch.float32), skeleton(base)):
        with pytest.raises(CheckpointError, match=message) as caught:
            load_adapter(model, folder)
        assert '\n' not in str(caught.value)
        assert str(folder) in str(caught.value)


@pytest.mark.parametrize('kind', ['other names', 'half of it', 'one factor', 'another width', 'nothing'])
def test_chat_and_merge_say_the_same(
    kind: str, base: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = rewritten(saved[0], tmp_path / 'adapter', WRONG[kind][0])
    monkeypatch.setattr('sys.stdin', open('/dev/null'))  # noqa: SIM115
    lines = []
    for words in (['chat', str(base), '--adapter', str(folder), '--prompt-template', 'internlm_chat'],
                  ['convert', 'merge', str(base), str(folder), str(tmp_path / 'merged'), '--verify', '0']):  # fmt: skip
        assert main(words) == 1
        lines.append([line for line in capsys.readouterr().err.splitlines() if 'error:' in line])
    assert [len(found) for found in lines] == [1, 1]
    assert lines[0] == lines[1]
    assert not (tmp_path / 'merged').exists()


def test_names_of_compiled_and_sharded_modules_are_known(
    base: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wrapped(tensors: Tensors) -> Tensors:
        found = renamed('model.layers.', 'model._fsdp_wrapped_module.layers.')(tensors)
        found = renamed('lora_B.weight', 'lora_B.default.weight')(found)
        return renamed(PREFIX, f'{PREFIX}_orig_mod.')(found)

    folder = rewritten(saved[0], tmp_path / 'adapter', wrapped)
    with caplog.at_level('INFO', logger='xtuner'):
        loaded = load_adapter(load_model(base, dtype=torch.float32), folder)
    torch.testing.assert_close(logits(loaded), saved[1])
    ignored = 'ignoring _fsdp_wrapped_module and _orig_mod and default in tensor names, added by torch.compile'
    assert caplog.text.count(ignored) == 1
    assert main(['convert', 'merge', str(base), str(folder), str(tmp_path / 'merged')]) == 0


def test_settings_and_weights_are_opened_once(
    base: Path, saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    for module in (load, settings):
        for name in {'open_file', 'read_object'} & vars(module).keys():
            monkeypatch.setattr(module, name, noted(getattr(module, name), opened))
    load_adapter(skeleton(base), saved[0])
    assert sorted(opened) == ['adapter_config.json', FILE]


def noted(read: Callable[..., Any], opened: list[str]) -> Callable[..., Any]:
    def reading(path: Path, *rest: Any) -> Any:
        opened.append(path.name)
        return read(path, *rest)

    return reading


def test_two_tensors_of_one_name_are_refused(base: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    key = f'{PREFIX}_orig_mod.{Q}.lora_A.weight'
    folder = rewritten(saved[0], tmp_path / 'adapter', lambda tensors: tensors | {key: torch.ones(4, 64)})
    with pytest.raises(CheckpointError, match='two of its tensors have the same name'):
        load_adapter(skeleton(base), folder)


def test_a_bin_file_is_read_as_data(base: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[0], tmp_path / 'adapter')
    torch.save(load_file(folder / FILE), folder / 'adapter_model.bin')
    (folder / FILE).unlink()
    loaded = load_adapter(load_model(base, dtype=torch.float32), folder)
    torch.testing.assert_close(logits(loaded), saved[1])
    assert main(['convert', 'merge', str(base), str(folder), str(tmp_path / 'merged')]) == 0
    torch.save({'a': Path('/')}, folder / 'adapter_model.bin')
    with pytest.raises(CheckpointError, match='objects other than tensors'):
        load_adapter(skeleton(base), folder)


def test_a_second_adapter_named_like_a_module_is_told_from_the_first(base: Path, tmp_path: Path) -> None:
    """peft's list of missing names holds those of every adapter that is loaded."""
    save_trained(base, tmp_path / 'first')
    second = logits(save_trained(base, tmp_path / 'second', seed=2, target_modules=['q_proj']))
    model = load_adapter(load_model(base, dtype=torch.float32), tmp_path / 'first', name='layers')
    model = load_adapter(model, tmp_path / 'second', name='self_attn')
    model.set_adapter('self_attn')
    torch.testing.assert_close(logits(model), second)


def test_settings_that_are_none(base: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = shutil.copytree(saved[0], tmp_path / 'adapter')
    for content in ('[]', '{', '[' * 100_000, json.dumps({'peft_type': 'NONE'})):
        (folder / 'adapter_config.json').write_text(content)
        with pytest.raises(CheckpointError, match='adapter') as caught:
            load_adapter(skeleton(base), folder)
        assert '\n' not in str(caught.value)
