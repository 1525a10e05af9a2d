"""What is loaded and under which names."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from xtuner.adapters.attach import Provenance
from xtuner.chat.base import BaseChoice
from xtuner.chat.load import open_chat_model
from xtuner.errors import CheckpointError, DataError, ModelError, UsageError
from xtuner.model.weights.reader import fingerprint, open_weights
from xtuner.serve.address import name_adapters
from xtuner.serve.models import load_served


def test_names_are_given_or_the_folders() -> None:
    assert name_adapters(['a/b/first', 'x=a/b/first', 'v1.5=c'], 'base') == {
        'first': Path('a/b/first'), 'x': Path('a/b/first'), 'v1.5': Path('c')}  # fmt: skip
    for words in (['a/one', 'b/one'], ['base=a'], ['x=a', 'x=b'], ['=a']):
        with pytest.raises(UsageError, match='NAME='):
            name_adapters(words, 'base')


def test_a_base_without_a_format_completes_and_says_why_it_does_not_chat(base: Path) -> None:
    model = load_served(str(base)).served[0]
    assert model.name == base.name and model.encode_text('Hi')[0] == model.tokenizer.bos_token_id
    assert model.stop_ids == {model.tokenizer.eos_token_id}
    with pytest.raises(DataError, match=r'no prompt template.*use /v1/completions.*--prompt-template'):
        model.render_chat([{'role': 'user', 'content': 'Hi'}])


def with_origin(adapter: Path, folder: Path, base: Path, **fields: Any) -> Path:
    """A copy of an adapter with what `xtuner train` writes beside it."""
    shutil.copytree(adapter, folder)
    origin = {'base': str(base), 'base_fingerprint': fingerprint(open_weights(base)), 'template': 'internlm_chat',
              'compute_dtype': 'fp32'} | fields  # fmt: skip
    Provenance(**origin).write(folder)
    return folder


def test_each_adapter_keeps_its_format_and_the_base_its_bits(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    four: Any = {'bits': 4, 'quant_type': 'nf4', 'double_quant': True}
    first = with_origin(adapters['first'], tmp_path / 'first', base, quantization=four)
    other = with_origin(adapters['first'], tmp_path / 'v1.5', base, quantization=four, template='default')
    loaded = load_served(str(base), adapters=[str(first), str(other)])
    assert [m.name for m in loaded.served] == [base.name, 'first', 'v1.5']
    assert [m.template and m.template.name for m in loaded.served] == [None, 'internlm_chat', 'default']
    assert loaded.model.get_base_model().is_loaded_in_4bit
    assert loaded.max_length == 2048
    third = with_origin(adapters['second'], tmp_path / 'third', base)
    with pytest.raises(UsageError, match="'first' and 'third' were trained with different quantization"):
        load_served(str(base), adapters=[str(first), str(third)])


def test_what_cannot_be_served(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    foreign = with_origin(adapters['first'], tmp_path / 'foreign', base, base_fingerprint='0' * 64)
    with pytest.raises(CheckpointError, match='another base'):
        load_served(str(base), adapters=[str(foreign)])
    with pytest.raises(CheckpointError, match='no adapter found'):
        load_served(str(base), adapters=[str(tmp_path)])
    from peft import PromptTuningConfig, get_peft_model

    from xtuner.model.loading import load_model

    config = PromptTuningConfig(num_virtual_tokens=2, task_type='CAUSAL_LM')
    get_peft_model(load_model(base, dtype=torch.float32), config).save_pretrained(tmp_path / 'prompt')
    with pytest.raises(ModelError, match='add tokens to the prompt'):
        load_served(str(base), adapters=[str(tmp_path / 'prompt')])


def test_using_an_adapter_is_having_it_alone(base: Path, adapters: dict[str, Path], loaded: Any) -> None:
    from xtuner.adapters.load import load_adapter
    from xtuner.model.loading import load_model

    ids = torch.tensor([[1, 5, 9, 13]])
    served = {model.name: model.adapter for model in loaded.served}
    for name in ('second', None, 'first', None, 'second'):
        alone: Any = load_model(base, dtype=torch.float32)
        alone = load_adapter(alone, adapters[name]).eval() if name else alone
        loaded.use(name and served[name])
        with torch.inference_mode():
            assert torch.equal(loaded.model(ids).logits, alone(ids).logits), name
    assert json.loads((adapters['second'] / 'adapter_config.json').read_text())['use_dora']


def test_names_of_any_kind_are_adapters_of_their_own(base: Path, adapters: dict[str, Path]) -> None:
    """peft keeps adapters in a ModuleDict, where a name may have no dot, and may not be an attribute of it."""
    names = ['v1.0', 'v1_0', 'train', 'update', 'values', 'half', 'lora_A', 'a', 'default', 'x/y', 'Ä 1']
    kinds = ['first', 'second']
    words = [f'{name}={adapters[kinds[number % 2]]}' for number, name in enumerate(names)]
    loaded = load_served(str(base), adapters=words, template='internlm_chat')
    assert [model.name for model in loaded.served] == [base.name, *names]
    logits = {}
    for model in loaded.served:
        loaded.use(model.adapter)
        with torch.inference_mode():
            logits[model.name] = loaded.model(torch.tensor([[1, 5, 9, 13]])).logits
    for number, name in enumerate(names):
        assert torch.equal(logits[name], logits[names[number % 2]]), name
    assert len({float(one.sum()) for one in logits.values()}) == 3


@pytest.mark.parametrize(('choice', 'said'), [
    (BaseChoice(), 'base model: 4 bits, compute dtype fp32, on cpu, as the adapter was trained (change with --bits)'),
    (BaseChoice(16), 'base model: fp32, unquantized, on cpu'),
    (BaseChoice(16, 'bf16', 'cpu'), 'base model: bf16, unquantized, on cpu'),
    (BaseChoice(4, 'bf16'), 'base model: 4 bits, compute dtype bf16, on cpu'),
])  # fmt: skip
def test_the_base_is_held_as_asked_and_said(
    base: Path, adapters: dict[str, Path], tmp_path: Path, choice: BaseChoice, said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    logging.getLogger('xtuner').propagate = True
    folder = with_origin(adapters['first'], tmp_path / 'first', base,
                         quantization={'bits': 4, 'quant_type': 'nf4', 'double_quant': True})  # fmt: skip
    with caplog.at_level(logging.INFO):
        loaded = load_served(str(base), adapters=[str(folder)], choice=choice)
        open_chat_model(str(base), adapter=folder, bits=choice.bits, dtype=choice.dtype, device=choice.device)
    records = {id(record): record.getMessage() for record in caplog.records}  # each once, whatever handlers there are
    assert [m for m in records.values() if m.startswith('base ')] == [said] * 2
    assert getattr(loaded.model.get_base_model(), 'is_loaded_in_4bit', False) == ('4 bits' in said)
    assert loaded.model.dtype == (torch.bfloat16 if 'bf16' in said else torch.float32)
