"""What of a stranger's adapter_config.json reaches peft."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.adapters import make_base, save_trained
from xtuner.adapters.attach import attach_adapter, read_provenance
from xtuner.adapters.load import load_adapter
from xtuner.adapters.settings import adapter_settings, check_patterns
from xtuner.errors import CheckpointError, ConfigError
from xtuner.model.loading import load_model


@pytest.fixture(scope='module')
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('adapters')
    save_trained(make_base(folder / 'base'), folder / 'adapter')
    return folder


@pytest.fixture
def changed(world: Path, tmp_path: Path) -> Any:
    def make(**fields: Any) -> Path:
        (tmp_path / 'adapter_model.safetensors').unlink(missing_ok=True)
        (tmp_path / 'adapter_model.safetensors').symlink_to(world / 'adapter' / 'adapter_model.safetensors')
        content = json.loads((world / 'adapter' / 'adapter_config.json').read_text()) | fields
        (tmp_path / 'adapter_config.json').write_text(json.dumps(content))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'r': 10**10}, '`r` must be at most 4096, got 10000000000'),
        ({'r': 'x'}, "`r` must be a whole number, got 'x'"),
        ({'rank_pattern': {'q_proj': 10**9}}, 'in `rank_pattern`: `q_proj` must be at most 4096'),
        ({'layer_replication': [[0, 10**9]]}, 'more than 1024 layers'),
        ({'peft_type': 'EVIL'}, "`peft_type` is 'EVIL'"),
        ({'peft_type': 'XLORA'}, "`peft_type` is 'XLORA'"),
        ({'peft_type': None}, '`peft_type` is missing$'),
        ({'task_type': 'SEQ_CLS'}, "`task_type` must be 'CAUSAL_LM' or None, got 'SEQ_CLS'"),
        ({'init_lora_weights': 'evil'}, r"must be True, False, 'gaussian', .* or 'pissa_niter_N' with .*, got 'evil'"),
        ({'init_lora_weights': 'pissa_niter_[number of iters]'}, '`init_lora_weights` must be True, False'),
        ({'init_lora_weights': 'pissa_niter_1000000'}, '`init_lora_weights` must be True, False'),
        ({'peft_type': 'ADALORA', 'rank_pattern': {'q': [10**9]}}, '`q` must be a list of True or False'),
        ({'bias': 'evil'}, '`bias` must be one of'),
        ({'megatron_config': {'a': 1}, 'megatron_core': 'this.s'}, '`megatron_config` is rejected'),
        ({'lora_dropout': float('nan')}, '`lora_dropout` must be a finite number'),
        ({'target_modules': {'a': 1}}, '`target_modules` must be a list of text or text or None'),
    ],
)
def test_a_wrong_field_is_named(changed: Any, fields: dict[str, Any], message: str) -> None:
    folder = changed(**fields)
    with pytest.raises(CheckpointError, match=message) as caught:
        adapter_settings(folder)
    assert str(folder / 'adapter_config.json') in str(caught.value)


@pytest.mark.parametrize('init', [False, 'gaussian', 'Gaussian', 'olora', 'pissa', 'pissa_niter_16', 'orthogonal'])
def test_an_adapter_is_loaded_however_it_was_begun(
    world: Path, tmp_path: Path, init: Any, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_trained(world / 'base', tmp_path, init_lora_weights=init)
    loaded = load_adapter(load_model(world / 'base', dtype=torch.float32), tmp_path)
    assert_same_adapter(loaded, saved)
    assert loaded.peft_config['default'].init_lora_weights == init
    random = init == 'pissa_niter_16'  # peft splits the base anew, and not as it did before training
    assert random == ('can differ from the trained one' in caplog.text)
    ids = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        assert random or torch.equal(loaded(ids).logits, saved(ids).logits)


def test_an_adalora_with_ranks_left_out_is_loaded(world: Path, tmp_path: Path) -> None:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=['q_proj'], task_type='CAUSAL_LM')
    saved: Any = get_peft_model(load_model(world / 'base', dtype=torch.float32), config)
    names = [name for name, _ in saved.base_model.model.named_parameters() if 'lora_E' in name]
    saved.peft_config['default'].rank_pattern = {name: [True, False, True, False] for name in names}
    saved.save_pretrained(tmp_path)
    loaded = load_adapter(load_model(world / 'base', dtype=torch.float32), tmp_path)
    ranks = [parameter.shape[0] for name, parameter in loaded.named_parameters() if 'lora_E' in name]
    assert ranks == [2] * len(names)


@pytest.mark.parametrize('kind', ['PromptTuningConfig', 'MultitaskPromptTuningConfig'])
@pytest.mark.parametrize('trainable', [False, True])
def test_a_prompt_that_began_as_text_is_loaded_from_its_values(
    world: Path, tmp_path: Path, kind: str, trainable: bool
) -> None:
    import peft

    config = getattr(peft, kind)(num_virtual_tokens=3, task_type='CAUSAL_LM')
    saved = peft.get_peft_model(load_model(world / 'base', dtype=torch.float32), config)
    saved.save_pretrained(tmp_path)
    content = json.loads((tmp_path / 'adapter_config.json').read_text())
    content |= {'prompt_tuning_init': 'TEXT', 'prompt_tuning_init_text': 'a', 'tokenizer_name_or_path': 'evil/evil'}
    if 'prompt_tuning_init_state_dict_path' in content:
        content |= {'prompt_tuning_init': 'EXACT_SOURCE_TASK', 'prompt_tuning_init_state_dict_path': '/evil.bin'}
    (tmp_path / 'adapter_config.json').write_text(json.dumps(content))
    loaded = load_adapter(load_model(world / 'base', dtype=torch.float32), tmp_path, trainable=trainable)
    assert_same_adapter(loaded, saved)


def assert_same_adapter(loaded: Any, saved: Any) -> None:
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(saved)
    torch.testing.assert_close(get_peft_model_state_dict(loaded), expected, rtol=0, atol=0)


def test_names_of_code_and_models_are_dropped(changed: Any) -> None:
    settings = adapter_settings(changed(
        auto_mapping={'parent_library': 'this', 'base_model_class': 's'}, base_model_name_or_path='evil/evil',
        revision='x', megatron_core='this.s', unknown='os.system',
    ))  # fmt: skip
    assert settings.auto_mapping is settings.base_model_name_or_path is settings.revision is None
    assert settings.megatron_core == 'megatron.core'
    assert not hasattr(settings, 'unknown')


def test_cut_weights_are_damaged_and_no_misfit(world: Path, changed: Any) -> None:
    folder = changed()
    whole = (folder / 'adapter_model.safetensors').read_bytes()
    (folder / 'adapter_model.safetensors').unlink()
    (folder / 'adapter_model.safetensors').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match='is damaged or truncated'):
        load_adapter(load_model(world / 'base', dtype=torch.float32), folder)


SLOW = '(.*.*.*.*.*.*.*.*.*.*.*.*.*)*x'


@pytest.mark.parametrize('fields', [{'target_modules': SLOW}, {'rank_pattern': {SLOW: 4}}, {'modules_to_save': [SLOW]}])
def test_a_pattern_without_end_is_refused(world: Path, changed: Any, fields: dict[str, Any]) -> None:
    model, began = load_model(world / 'base', dtype=torch.float32), time.process_time()
    with pytest.raises(CheckpointError, match='takes too long to match'):
        load_adapter(model, changed(**fields))
    assert time.process_time() - began < 2  # of this process; the trial has a limit of its own


def test_patterns_that_begin_alike_are_all_tried() -> None:
    begin = 'x' * 32
    ranks = {f'{begin}(a+)+$': 4, f'{begin}(ok)?': 4}
    with pytest.raises(CheckpointError, match=rf'`rank_pattern\[{begin}\]` takes too long to match .*\(a\+\)\+\$'):
        check_patterns({'rank_pattern': ranks}, [begin + 'a' * 40 + '!'], 'here')


def test_a_sound_pattern_is_taken(world: Path, changed: Any) -> None:
    pattern = r'.*\.(q|k|v|o|gate|up|down)_proj'
    model = load_adapter(load_model(world / 'base', dtype=torch.float32), changed(target_modules=pattern))
    assert model.peft_config['default'].target_modules == pattern


def test_a_pattern_of_the_config_is_bounded_too(world: Path) -> None:
    model = load_model(world / 'base', dtype=torch.float32)
    with pytest.raises(ConfigError, match='`target_modules` takes too long'):
        attach_adapter(model, {'type': 'peft:LoraConfig', 'target_modules': SLOW})


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'quantization': 'x'}, "`quantization` must be a dict or None, got 'x'"),
        ({'quantization': {'bits': 5}}, '`quantization.bits` must be one of 4, 8, got 5'),
        ({'quantization': {'evil': 5}}, 'unknown key `quantization.evil`'),
        ({'base_fingerprint': 5}, '`base_fingerprint` must be text, got 5'),
        ({'compute_dtype': 'load'}, "`compute_dtype` must be one of 'bf16', 'fp16', 'fp32', got 'load'"),
        ({'training': {'data': 5}}, '`data` must be a list of text or None, got 5'),
        ({'evil': 1}, "unknown field 'evil'"),
    ],
)
def test_a_wrong_field_of_the_provenance_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    sound = {'base': 'b', 'base_fingerprint': 'f', 'template': 't', 'compute_dtype': 'fp32'}
    (tmp_path / 'xtuner.json').write_text(json.dumps(sound | fields))
    with pytest.raises(CheckpointError, match=message):
        read_provenance(tmp_path)
