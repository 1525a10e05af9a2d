"""What of a stranger's config.json reaches transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

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
        ({'num_hidden_layers': 100}, '`num_hidden_layers` is 100, but the weights contain 2 layers'),
        ({'intermediate_size': 2**24}, 'describes a model of'),
        ({'vocab_size': -1}, '`vocab_size` must be at least 1, got -1'),
        ({'hidden_size': 0}, '`hidden_size` must be at least 1, got 0'),
        ({'hidden_size': 'x'}, 'hidden_size'),
        ({'head_dim': -3}, '`head_dim` must be at least 1, got -3'),
        ({'num_key_value_heads': 3}, 'is not a multiple of'),
        ({'pad_token_id': 10**12}, '`pad_token_id` must be at most'),
        ({'num_layers': 10**9}, '`num_layers` must be at most 1024'),
        ({'n_layer': 10**9}, '`n_layer` must be at most 1024'),
        ({'vocab_size': {'__float__': 'Infinity'}}, '`vocab_size` must be at most'),
        ({'torch_dtype': 'torch.load'}, '`torch_dtype` must be a dtype'),
        ({'hidden_act': 'evil'}, "no model can be built from it: KeyError: .*'evil'"),
        ({'rope_parameters': {'rope_type': 'evil'}}, 'evil'),
        ({'dtype': 5}, 'dtype'),
        ({'text_config': 7}, 'the text config must be a dict, got 7'),
        ({'dtype': 'load'}, "`dtype` must be a dtype's name such as 'bfloat16', got 'load'"),
        ({'torch_dtype': 'os.system'}, '`torch_dtype` must be a dtype'),
        ({'model_type': 'vit'}, 'is not a causal language model|config.json'),
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
    with pytest.raises(ModelError, match='contains a model and an adapter'):
        load_model(changed(), dtype=torch.float32)


@pytest.mark.parametrize(
    ('fields', 'name', 'value'),
    [
        ({'feature_layer': -2}, 'feature_layer', -2),
        ({'vision_feature_layer': [-2, -5]}, 'vision_feature_layer', None),  # a list of a name that is not declared
        ({'time_step_limit': [0.0, {'__float__': 'Infinity'}], 'limit': math.inf}, 'limit', math.inf),
        ({'mask_value': -3.4e38}, 'mask_value', -3.4e38),
        ({'dtype': 'torch.bfloat16', 'torch_dtype': 'torch.bfloat16'}, 'dtype', torch.bfloat16),
        ({'pad_token_id': 320}, 'pad_token_id', None),
        ({'pad_token_id': 400}, 'pad_token_id', None),
    ],
)
def test_what_published_models_have_is_taken(changed: Any, fields: dict[str, Any], name: str, value: Any) -> None:
    folder = changed(**fields)
    config = load_config(folder)
    check_weights(folder, config)
    assert getattr(config, name, None) == value


def test_a_pad_token_outside_of_the_vocabulary_is_left_out_with_a_word(changed: Any, caplog: Any) -> None:
    model = load_model(changed(pad_token_id=320), dtype=torch.float32)
    assert model.get_input_embeddings().padding_idx is None
    assert '`pad_token_id` (320) is not below `vocab_size` (320) and is ignored' in caplog.text


def test_a_tokenizer_loads_from_a_model_whose_weights_are_quantised(changed: Any) -> None:
    folder = changed(quantization_config={'quant_method': 'fp8', 'scale_dtype': 'ue8m0'})
    with pytest.raises(ModelError, match='quant'):
        load_config(folder)
    assert len(load_tokenizer(folder)) > 0
    _make_plain(folder)
    assert len(load_tokenizer(folder)) > 0


def _make_plain(folder: Path) -> None:
    """Puts a `tokenizer.json` in place of the tokenizer, which transformers' own class loads."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(folder).backend_tokenizer)
    for name in ('tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json'):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
