"""InternLM as Llama: the same logits from transformers' own Llama, streamed, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.model.published import CONFIGS, TRAINED, write_model, write_tokenizer
from xtuner.cli.main import main
from xtuner.convert.to_llama import to_llama
from xtuner.errors import ModelError
from xtuner.model.loading import load_model, load_tokenizer

SHARD = 20_000  # bytes: several shards for the small models


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, 300, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize('name', [name for name in CONFIGS if name != 'v3-mixed'])
def test_the_same_logits_from_plain_llama(tmp_path: Path, name: str) -> None:
    """Past the trained length as well: without a cache, transformers' dynamic NTK is the original's."""
    folder = write_tokenizer(write_model(tmp_path / 'model', name, 'bin-sharded', stray=True))
    out = to_llama(str(folder), tmp_path / 'llama', max_shard_bytes=SHARD)
    ours = load_model(folder, dtype=torch.float32)
    llama = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    for length in (5, TRAINED + 9):
        with torch.no_grad():
            torch.testing.assert_close(llama(ids(length)).logits, ours(ids(length)).logits, rtol=1e-5, atol=1e-4)
    config = json.loads((out / 'config.json').read_text())
    assert config['model_type'] == 'llama'
    assert config['attention_bias'] is CONFIGS[name]['bias']
    assert config['mlp_bias'] is (CONFIGS[name]['bias'] and name.startswith('v3'))
    assert 'auto_map' not in config
    shards = sorted(out.glob('*.safetensors'))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < 2 * SHARD + 5000  # the embedding alone is 40,960 bytes


def test_tensors_are_bit_for_bit_the_published_ones(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v1'))
    out = to_llama(str(folder), tmp_path / 'llama')
    before = torch.load(folder / 'pytorch_model.bin', weights_only=True)
    after = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v1'))
    out = to_llama(str(folder), tmp_path / 'llama')
    plain = AutoTokenizer.from_pretrained(out)
    assert plain('Hello <eoa>\n').input_ids == load_tokenizer(folder)('Hello <eoa>\n').input_ids
    assert (out / 'tokenizer.model').read_bytes() == (folder / 'tokenizer.model').read_bytes()


def test_nothing_is_written_over_and_nothing_half(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v1', 'safetensors-sharded'))
    with pytest.raises(ModelError, match='is not empty'):
        to_llama(str(folder), folder)
    (folder / 'tokenizer.model').unlink()
    with pytest.raises(ModelError, match='contains no tokenizer'):
        to_llama(str(folder), tmp_path / 'llama')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model']


def test_other_families_are_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v1'))
    to_llama(str(folder), tmp_path / 'llama')
    with pytest.raises(ModelError, match="of type 'llama'; to-llama converts internlm, internlm2, internlm3"):
        to_llama(str(tmp_path / 'llama'), tmp_path / 'again')


def test_biases_that_llama_has_no_form_for(tmp_path: Path) -> None:
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v3-mixed'))
    with pytest.raises(ModelError, match='Llama architecture does not support'):
        to_llama(str(folder), tmp_path / 'llama')


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tokenizer(write_model(tmp_path / 'model', 'v2'))
    assert main(['convert', 'to-llama', str(folder), str(tmp_path / 'llama'), '--max-shard-size', '20KB']) == 0
    assert capsys.readouterr().out == f'{tmp_path / "llama"}\n'
    assert main(['convert', 'to-llama', str(tmp_path / 'absent'), str(tmp_path / 'x')]) == 1
    assert 'no such folder' in capsys.readouterr().err
