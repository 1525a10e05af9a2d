"""Loading a model: 4 and 8 bit, what is refused, what is said."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.model.published import CONFIGS, VOCAB, random_weights, write_model, write_tokenizer
from tests.model.weights.test_reader import write
from xtuner.config.schema import QuantizationConfig
from xtuner.errors import ModelError
from xtuner.model.families.internlm.modeling import InternLMForCausalLM
from xtuner.model.families.internlm.tokenization import InternLMTokenizer
from xtuner.model.families.internlm2.modeling import InternLM2Model
from xtuner.model.loading import load_model, load_tokenizer, register

FP32 = torch.float32
IDS = torch.tensor([[1, 5, 9, 200, 31]])


def rewrite(folder: Path, **changes: object) -> None:
    """Changes fields of config.json; None takes one out."""
    config = json.loads((folder / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize('name', ['v1', 'v1-8k', 'v2'])
def test_plain_loading_ends_ready_to_use(tmp_path: Path, name: str) -> None:
    model = load_model(write_model(tmp_path, name, 'bin-sharded', stray=True), dtype=torch.bfloat16)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == 'sdpa'
    assert model.device.type == 'cpu'


def test_registering_twice_is_harmless(tmp_path: Path) -> None:
    for _ in range(2):
        register()
        assert type(AutoModelForCausalLM.from_pretrained(write_model(tmp_path, 'v1'))) is InternLMForCausalLM


def test_auto_classes_take_published_folders_without_remote_code(tmp_path: Path) -> None:
    """`auto_map` names code that is not even there."""
    folder = write_tokenizer(write_model(tmp_path, 'v1'))
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is InternLMForCausalLM
    assert type(AutoTokenizer.from_pretrained(folder)) is InternLMTokenizer


@pytest.mark.parametrize('name', ['v1', 'v1-8k', 'v2'])
@pytest.mark.parametrize('bits', [4, 8])
def test_quantised(tmp_path: Path, name: str, bits: int) -> None:
    folder = write_model(tmp_path, name)
    exact = load_model(folder, dtype=FP32)(IDS).logits
    model = load_model(folder, dtype=FP32, quantization=QuantizationConfig(bits=bits))
    kinds = {type(module).__name__ for module in model.modules()}
    assert ('Linear4bit' if bits == 4 else 'Linear8bitLt') in kinds
    assert type(model.get_output_embeddings()) is torch.nn.Linear  # the head stays as it was
    close = torch.nn.functional.cosine_similarity(model(IDS).logits.float(), exact, dim=-1)
    assert close.mean() > (0.7 if bits == 4 else 0.99)
    assert not torch.equal(model(IDS).logits, exact)


def test_quantised_fp4_without_double_quantisation(tmp_path: Path) -> None:
    option = QuantizationConfig(quant_type='fp4', double_quant=False)
    model = load_model(write_model(tmp_path, 'v1'), dtype=FP32, quantization=option)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ('fp4', False)


@pytest.mark.parametrize('name', ['v2', 'v2-dynamic'])
def test_backbone_of_a_reward_model(tmp_path: Path, name: str) -> None:
    tensors = random_weights(CONFIGS[name])
    del tensors['output.weight']
    whole = load_model(write_model(tmp_path / 'whole', name), dtype=FP32)
    folder = write_model(tmp_path / 'reward', name)
    rewrite(folder, architectures=['InternLM2ForRewardModel'])
    write(folder, 'bin', tensors | {'v_head.weight': torch.ones(1, 32)})
    backbone, report = AutoModel.from_pretrained(folder, dtype=FP32, output_loading_info=True)
    assert type(backbone) is InternLM2Model
    assert not report['missing_keys']
    torch.testing.assert_close(backbone(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)
    with pytest.raises(ModelError, match=r"no file contains tensor 'output\.weight'"):  # it is no language model
        load_model(folder, dtype=FP32)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r'config\.json is missing'):
        load_model(tmp_path, dtype=FP32)
    folder = write_model(tmp_path / 'model', 'v1')
    (folder / 'pytorch_model.bin').unlink()
    with pytest.raises(ModelError, match='contains no weights'):
        load_model(folder, dtype=FP32)
    (folder / 'config.json').write_text('{')
    with pytest.raises(ModelError, match=r'config\.json cannot be read'):
        load_model(folder, dtype=FP32)


def test_unknown_rotary_forms_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 'v1')
    rewrite(folder, rotary={'type': 'yarn'})
    with pytest.raises(ModelError, match=r"`rotary.type` of InternLM is 'yarn'; allowed: origin, dynamic"):
        load_model(folder, dtype=FP32)
    folder = write_model(tmp_path / 'v2', 'v2')
    rewrite(folder, rope_scaling={'type': 'yarn', 'factor': 2.0})
    with pytest.raises(ModelError, match='dynamic, linear'):
        load_model(folder, dtype=FP32)


REMOTE = "open('/tmp/xtuner-remote-ran', 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM\n" \
         "class C(LlamaConfig):\n    model_type = 'foreign'\n" \
         'class M(LlamaForCausalLM):\n    config_class = C\n'  # fmt: skip


def test_remote_code_runs_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = Path('/tmp/xtuner-remote-ran')
    ran.unlink(missing_ok=True)
    monkeypatch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(tmp_path / 'cache'))
    folder = write_model(tmp_path / 'model', 'v1-no-bias')
    (folder / 'foreign.py').write_text(REMOTE)
    rewrite(folder, model_type='foreign', auto_map={'AutoConfig': 'foreign.C', 'AutoModelForCausalLM': 'foreign.M'})
    with pytest.raises(ModelError, match=r"type 'foreign' is not supported natively .* pass --trust-remote-code"):
        load_model(folder, dtype=FP32)
    assert not ran.exists()
    model = load_model(folder, dtype=FP32, trust_remote_code=True)
    assert model(IDS).logits.shape == (1, 5, VOCAB)
    assert ran.exists()
    ran.unlink()


def test_internlm_needs_no_remote_code_even_when_it_may(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 'v1')
    assert type(load_model(folder, dtype=FP32, trust_remote_code=True)) is InternLMForCausalLM


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / 'small')
    (folder / 'tokenizer_config.json').write_text(
        json.dumps({'tokenizer_class': 'OtherTokenizer', 'auto_map': {'AutoTokenizer': ['other.OtherTokenizer', None]}})
    )
    with pytest.raises(ModelError, match='OtherTokenizer is not supported natively'):
        load_tokenizer(folder)


def test_what_a_model_may_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('./absent', 'a/b/c', '/nowhere/at/all'):
        with pytest.raises(ModelError, match='no such folder, and not a hub id'):
            load_model(name, dtype=FP32)
    file = tmp_path / 'config.json'
    shutil.copyfile(write_model(tmp_path / 'model', 'v1') / 'config.json', file)
    with pytest.raises(ModelError, match='is a file; name the folder'):
        load_model(file, dtype=FP32)
    with pytest.raises(ModelError, match='is not in the cache, and the hub cannot be reached'):
        load_model('nobody/nothing-of-the-kind', dtype=FP32)
    with pytest.raises(ModelError, match='write modelscope:OWNER/NAME'):
        load_model('modelscope:name', dtype=FP32)


def test_what_cannot_be_had(tmp_path: Path) -> None:
    folder = write_model(tmp_path, 'v1')
    with pytest.raises(ModelError, match='flash_attn is not installed'):
        load_model(folder, dtype=FP32, attention='flash_attention_2')
    with pytest.raises(ModelError, match='cannot compute in 4 bit on meta'):
        load_model(folder, dtype=FP32, quantization=QuantizationConfig(), device='meta')


def test_loading_draws_no_bar_where_stderr_is_no_terminal(
    tiny_internlm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, 'xtuner')
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr('xtuner.utils.progress._EVERY_S', 0)
    load_model(tiny_internlm, dtype=torch.float32)
    err = capsys.readouterr().err  # lines of the log, where an earlier test has begun one
    assert '\r' not in err and 'it/s' not in err
    assert any(line.startswith('Loading weights: ') for line in caplog.messages)


def test_bitsandbytes_does_not_advise_a_package_that_is_never_used() -> None:
    log = logging.getLogger('bitsandbytes.backends.cpu.ops')

    def passes(text: str) -> bool:
        return bool(log.filter(log.makeRecord(log.name, logging.WARNING, __file__, 1, text, ('x',), None)))

    assert not passes('Failed to load CPU gemm_4bit_forward: %s. Please make sure you already `pip install kernels`')
    assert passes('something else: %s')
