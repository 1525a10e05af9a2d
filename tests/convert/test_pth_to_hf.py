"""Checkpoints of classical xtuner: mmengine's file, DeepSpeed's folder, with all that a run leaves in them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.convert.adapters import make_base, save_trained
from xtuner.cli.main import main

IDS = torch.arange(3, 20)[None]

CLASSICAL = """
from mmengine.config import read_base  # noqa: F401
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE
pretrained_model_name_or_path = {base!r}
prompt_template = PROMPT_TEMPLATE.internlm_chat
model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=pretrained_model_name_or_path),
    lora=dict(type=LoraConfig, r={r}, lora_alpha=8, lora_dropout=0.1, bias='none', task_type='CAUSAL_LM'))
"""
FULL = CLASSICAL[: CLASSICAL.index('    lora=')] + ')\n'


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp('base'))


def records() -> dict[str, Any]:
    """What mmengine keeps of a run beside the weights."""
    loss = HistoryBuffer([2.0, 1.5], [1, 1])
    return {
        'meta': {'epoch': 1, 'iter': 500, 'cfg': 'a = 1', 'seed': 7, 'time': '20231120', 'experiment_name': 'x'},
        'message_hub': {'log_scalars': OrderedDict({'train/loss': loss}), 'resumed_keys': OrderedDict(),
                        'runtime_info': OrderedDict(lr=np.float64(0.1), steps=np.int64(500), names=np.arange(3))},
        'param_schedulers': [{'last_step': 3, 'verbose': False}],
    }  # fmt: skip


def config(tmp_path: Path, base: Path, text: str = CLASSICAL, r: int = 4) -> str:
    path = tmp_path / 'run.py'
    path.write_text(text.format(base=str(base), r=r))
    return str(path)


def state(model: Any, form: str) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names that either form gives them."""
    from peft import get_peft_model_state_dict

    if form == 'mmengine':  # the adapter alone, without its name
        return {f'llm.{name}': tensor for name, tensor in get_peft_model_state_dict(model).items()}
    trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return {f'llm.{name}': tensor for name, tensor in trained.items()}


@pytest.mark.parametrize('form', ['mmengine', 'deepspeed'])
def test_an_adapter_loads_in_plain_peft_with_the_same_logits(base: Path, form: str, tmp_path: Path) -> None:
    adapted = save_trained(base, tmp_path / 'made', modules_to_save=['lm_head'], rank_pattern={'q_proj': 3})
    path = tmp_path / 'iter_500.pth'
    if form == 'mmengine':
        torch.save({'state_dict': OrderedDict(state(adapted, form)), **records()}, path)
    else:
        path.mkdir()
        torch.save({'module': OrderedDict(state(adapted, form)), 'dp_world_size': 8, 'ds_version': '0.12', **records()},
                   path / 'mp_rank_00_model_states.pt')  # fmt: skip
    out = tmp_path / 'out'
    assert main(['convert', 'pth_to_hf', config(tmp_path, base), str(path), str(out), '--fp32']) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, adapted(IDS).logits)
    settings = json.loads((out / 'adapter_config.json').read_text())
    assert settings['base_model_name_or_path'] == str(base)
    assert settings['modules_to_save'] == ['lm_head']
    assert 'eoh' in (out / 'chat_template.jinja').read_text()
    assert main(['convert', 'merge', str(base), str(out), str(tmp_path / 'merged'), '--dtype', 'fp32']) == 0


def test_a_whole_model(base: Path, tmp_path: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    torch.save({'state_dict': {f'llm.{name}': t + 0.5 for name, t in weights.items()}, **records()}, tmp_path / 'a.pth')
    words = [config(tmp_path, base, FULL), str(tmp_path / 'a.pth'), str(tmp_path / 'out')]
    assert main(['convert', 'pth_to_hf', *words]) == 0
    read = AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
    assert read.dtype == torch.float16
    assert all(torch.equal(t, (weights[name] + 0.5).half()) for name, t in read.state_dict().items())


@pytest.mark.parametrize('form', ['model', 'adapter'])
def test_values_beyond_float16(form: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if form == 'model':
        weights, text = AutoModelForCausalLM.from_pretrained(base).state_dict(), FULL
        tensors = {f'llm.{name}': tensor for name, tensor in weights.items()}
    else:
        tensors, text = state(save_trained(base, tmp_path / 'made'), 'mmengine'), CLASSICAL
    torch.save({'state_dict': {name: t * 1e8 for name, t in tensors.items()}, **records()}, tmp_path / 'a.pth')
    words = [config(tmp_path, base, text), str(tmp_path / 'a.pth'), str(tmp_path / 'out')]
    assert main(['convert', 'pth_to_hf', *words]) == 1
    assert 'values beyond the range of float16; use --fp32' in capsys.readouterr().err
    assert main(['convert', 'pth_to_hf', *words, '--fp32']) == 0


def test_a_checkpoint_of_ours_is_copied_without_the_trainers_state(base: Path, tmp_path: Path) -> None:
    from tests.convert.adapters import save_trained

    checkpoint = tmp_path / 'run' / 'checkpoint-00000002'
    save_trained(base, checkpoint)
    for name in ('manifest.json', 'run.json', 'trainer.json', 'trainer.safetensors'):
        (checkpoint / name).write_text('{}')
    (tmp_path / 'run' / 'last').write_text('checkpoint-00000002')
    for number, named in enumerate((checkpoint, tmp_path / 'run')):
        out = tmp_path / f'out{number}'
        assert main(['convert', 'pth_to_hf', 'any.py', str(named), str(out)]) == 0
        assert sorted(path.name for path in out.iterdir()) == [
            'README.md', 'adapter_config.json', 'adapter_model.safetensors',
        ]  # fmt: skip
        assert main(['convert', 'merge', str(base), str(out), str(tmp_path / f'merged{number}')]) == 0
