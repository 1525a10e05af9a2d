"""What of a stranger's config.json reaches transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.adapters import make_base
from xtuner.errors import ModelError
from xtuner.model.check import check_weights
from xtuner.model.loading import load_config, load_model, load_tokenizer


@pytest.fixture(scope='module')
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp('base') / 'model')


@pytest.fixture
def changed(base: Path, tmp_path: Path) -> Any:
    """Makes a folder like `base` with other fields in its config."""

    def make(**fields: Any) -> Path:
        for path in base.iterdir():
            (tmp_path / path.name).unlink(missing_ok=True)
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / 'config.json').unlink()
        (tmp_path / 'config.json').write_text(json.dumps(json.loads((base / 'config.json').read_text()) | fields))
        return tmp_path

    return make


def test_nothing_of_a_stranger_is_looked_up(changed: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, 'get_kernel', lambda *args, **kwargs: pytest.fail('a kernel was fetched'))
    folder = changed(
        attn_implementation='evil/evil', _attn_implementation='evil/evil', experts_implementation='evil/evil',
        _attn_implementation_internal='evil/evil', auto_map={'AutoConfig': 'x.Y'}, transformers_weights='../x',
        to_dict=3, attribute_map={'a': 'b'}, extra_files=['../x'], custom_generate='evil/evil', fusion_config={'a': 1},
        return_dict=False, some_text='os.system', some_number=7, some_object={'attn_implementation': 'evil/evil'},
    )  # fmt: skip
    config = load_config(folder)
    assert config._attn_implementation is None
    assert config.return_dict is True
    assert not hasattr(config, 'auto_map') and not hasattr(config, 'some_text') and not hasattr(config, 'some_object')
    assert config.some_number == 7
    assert 'extra_files' not in vars(config)
    assert config.to_dict()['hidden_size'] == 64
    model = load_model(folder, dtype=torch.float32)
    assert model.config._attn_implementation == 'sdpa'
    assert '`attn_implementation` names' in caplog.text


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'num_hidden_layers': 10**9}, '`num_hidden_layers` must be at most 1024'),
        ({'num_hidden_layers': 100}, '`num_hidden_layers` is 100, but the weights hold 2 layers'),
        ({'intermediate_size': 2**24}, 'describes a model of'),
        ({'vocab_size': -1}, '`vocab_size` must be at least 1, got -1'),
        ({'hidden_size': 0}, '`hidden_size` must be at least 1, got 0'),
        ({'hidden_size': 'x'}, 'hidden_size'),
        ({'head_dim': -3}, '`head_dim` must be at least 1, got -3'),
        ({'num_key_value_heads': 3}, 'is no multiple of'),
        ({'pad_token_id': 10**12}, '`pad_token_id` must be at most'),
        ({'pad_token_id': 400}, r'`pad_token_id` must be below `vocab_size` \(320\), got 400'),
        ({'hidden_act': 'evil'}, "no model can be built from it: KeyError: .*'evil'"),
        ({'rope_parameters': {'rope_type': 'evil'}}, 'evil'),
        ({'dtype': 5}, 'dtype'),
        ({'dtype': 'load'}, "`dtype` must be a dtype's name such as 'bfloat16', got 'load'"),
        ({'torch_dtype': 'os.system'}, '`torch_dtype` must be a dtype'),
        ({'model_type': 'vit'}, 'is no causal language model|config.json'),
        ({'model_type': ['x']}, 'is not supported natively'),
        ({'tokenizer_class': 'pipeline'}, "`tokenizer_class` must be a tokenizer's name, got 'pipeline'"),
        ({'quantization_config': {'quant_method': 'fp8'}}, "`quantization_config.quant_method` is 'fp8'"),
        ({'quantization_config': {'quant_method': 'bitsandbytes', 'load_in_4bit': True,
                                  'llm_int8_skip_modules': ['(a*)*b']}}, 'must be module names'),
        ({'quantization_config': {'load_in_4bit': True, 'bnb_4bit_compute_dtype': 'load'}}, "must be a dtype's name"),
        ({'quantization_config': 3}, '`quantization_config` must be a dict, got 3'),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(changed: Any, fields: dict[str, Any], message: str) -> None:
    folder = changed(**fields)
    with pytest.raises(ModelError, match=message) as caught:
        check_weights(folder, load_config(folder))
    assert str(folder) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_a_model_folder_with_an_adapter_in_it_is_refused(changed: Any) -> None:
    (changed() / 'adapter_config.json').write_text('{"base_model_name_or_path": "evil/evil"}')
    with pytest.raises(ModelError, match='holds a model and an adapter'):
        load_model(changed(), dtype=torch.float32)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'tokenizer_class': 'AutoModelForCausalLM'}, "`tokenizer_class` must be a tokenizer's name"),
        ({'tokenizer_class': 'AutoTokenizer'}, "`tokenizer_class` must be a tokenizer's name"),
        ({'fast_tokenizer_files': ['../tokenizer.1.0.0.json']}, '`fast_tokenizer_files` is refused'),
        ({'vocab_file': '/etc/passwd'}, '`vocab_file` is refused'),
        ({'eos_token': 3}, '`eos_token` must be a dict or text or None, got 3'),
        ({'auto_map': 'x'}, '`auto_map` must be a dict or a list or None'),
    ],
)
def test_a_wrong_field_of_a_tokenizer_is_named(changed: Any, fields: dict[str, Any], message: str) -> None:
    folder = changed()
    path = folder / 'tokenizer_config.json'
    content = json.loads(path.read_text()) | fields
    path.unlink()
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        load_tokenizer(folder)
