"""InternLM2 and InternLM3 through the whole job: 4 bit, an adapter on every layer, merged by name, out as Llama."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from tests.model.published import HEADS, HIDDEN, KEY_HEADS, write_model, write_tokenizer
from xtuner.cli.main import main
from xtuner.model.loading import load_model

LAYERS = {
    'v2-bias': {'wqkv', 'wo', 'w1', 'w2', 'w3'},
    'v3': {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'},
}


@pytest.mark.parametrize('name', LAYERS)
def test_train_merge_and_out_as_llama(name: str, conversations: Path, tmp_path: Path) -> None:
    family = {'v2-bias': 'InternLM2', 'v3': 'InternLM3'}[name]
    base = write_tokenizer(write_model(tmp_path / 'base', name, 'bin-sharded'), family)
    words = ['train', 'internlm_7b_qlora_oasst1', '--model', str(base), '--data', str(conversations),
             '--work-dir', str(tmp_path / 'run'), '--max-steps', '2', '--cfg-options', 'model.template=internlm2_chat',
             'dataset.max_length=64', 'schedule.accumulative_counts=1', 'adapter.r=4', 'optimizer.lr=0.02',
             'samples.max_new_tokens=2']  # fmt: skip
    assert main(words) == 0
    adapter = tmp_path / 'run' / 'checkpoint-00000002'
    settings = json.loads((adapter / 'adapter_config.json').read_text(encoding='utf-8'))
    assert {module.rpartition('.')[2] for module in settings['target_modules']} == LAYERS[name]

    assert (
        main(
            [
                'convert',
                'merge',
                str(base),
                str(adapter),
                str(tmp_path / 'merged'),
                '--dtype',
                'fp32',
                '--base',
                'original',
            ]
        )
        == 0
    )
    assert main(['convert', 'to-llama', str(tmp_path / 'merged'), str(tmp_path / 'llama')]) == 0
    llama = LlamaForCausalLM.from_pretrained(tmp_path / 'llama', dtype=torch.float32)
    ids = torch.randint(3, 300, (2, 15), generator=torch.Generator().manual_seed(0))
    plain = load_model(base, dtype=torch.float32)
    with torch.no_grad():
        before = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, adapter)(ids).logits
        merged = load_model(tmp_path / 'merged', dtype=torch.float32)(ids).logits
        exported = llama(ids).logits
    effect = (adapted - before).abs().max()
    assert effect > 0.1
    assert (merged - adapted).abs().max() < 1e-4 * effect  # another order of sums
    assert (exported - adapted).abs().max() < 1e-4 * effect
    size = llama.config.head_dim
    attention = llama.model.layers[0].self_attn
    shapes = [tuple(p.weight.shape) for p in (attention.q_proj, attention.k_proj)]
    assert shapes == [(HEADS * size, HIDDEN), (KEY_HEADS * size, HIDDEN)]


def test_a_tokenizer_with_ids_that_the_model_lacks(
    conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_tokenizer(write_model(tmp_path / 'base', 'v2'), 'InternLM3')  # whose names stand behind 320 pieces
    words = ['train', 'internlm_7b_lora_oasst1', '--model', str(base), '--data', str(conversations),
             '--work-dir', str(tmp_path / 'run'), '--cfg-options', 'model.template=internlm2_chat']  # fmt: skip
    assert main(words) == 1
    assert 'the tokenizer has 322 ids but the model 320' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_a_model_that_mixes_the_samples_of_a_pack_is_trained_unpacked(
    conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from xtuner.config.load import load_config

    base = write_tokenizer(tmp_path / 'base', 'InternLM')
    BloomForCausalLM(BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(base)
    words = ['train', 'internlm_7b_lora_oasst1', '--model', str(base), '--data', str(conversations),
             '--work-dir', str(tmp_path / 'run'), '--max-steps', '1', '--cfg-options', 'dataset.max_length=64',
             'model.attention=eager', 'schedule.accumulative_counts=1', 'adapter.r=4',
             'samples.prompts=[]']  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "in a model of type 'bloom' the samples of a pack see each other: packing is switched off" in said
    assert load_config(str(tmp_path / 'run' / 'config.py')).dataset.packing == 'none'
    assert main([*words, '--resume']) == 0  # the same data, though the words ask for packs
