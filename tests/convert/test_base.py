"""`--base dequantized`: bit for bit what `load_model` holds for training, whatever the settings and the dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import write_internlm
from tests.convert.adapters import make_base, make_gpt2
from xtuner.config.schema import QuantizationConfig
from xtuner.convert import base as module
from xtuner.convert.base import QuantizedBase
from xtuner.fused.frozen import FrozenLinear
from xtuner.kernels.quantized import unpack_weight
from xtuner.kernels.reference import dequantize_into
from xtuner.model.loading import load_model
from xtuner.model.weights.reader import open_weights

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
SETTINGS = {
    'nf4': QuantizationConfig(),
    'nf4, plain scales': QuantizationConfig(double_quant=False),
    'fp4': QuantizationConfig(quant_type='fp4'),
    '8 bit': QuantizationConfig(bits=8),
}


def values_in_memory(folder: Path, dtype: torch.dtype, settings: QuantizationConfig) -> dict[str, torch.Tensor]:
    """Each weight as a loaded layer computes with it."""
    import bitsandbytes as bnb

    model = load_model(folder, dtype=dtype, quantization=settings)
    held = {name: parameter.data for name, parameter in model.named_parameters()}
    num_quantized = 0
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            held[f'{name}.weight'] = FrozenLinear(layer).matrix(dtype)
        elif isinstance(layer, bnb.nn.Linear8bitLt):
            whole = bnb.functional.int8_vectorwise_dequant(layer.weight.CB, layer.weight.SCB)
            held[f'{name}.weight'] = whole.to(dtype)
        num_quantized += isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    assert num_quantized
    return held


@pytest.mark.parametrize('settings', SETTINGS)
@pytest.mark.parametrize('dtype', DTYPES)
def test_bit_for_bit_what_training_holds(
    tmp_path: Path, settings: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, '_QUANTIZED_AT_ONCE', 1024)  # several parts a weight
    folder = write_internlm(tmp_path / 'base', vocab_size=120, hidden=64)
    held = values_in_memory(folder, DTYPES[dtype], SETTINGS[settings])
    reader = open_weights(folder)
    base = QuantizedBase(reader, SETTINGS[settings], DTYPES[dtype], torch.device('cpu'))
    assert set(reader.names()) == set(held)
    for name, tensor in held.items():
        rows = base.open(name)
        again = torch.cat([rows(0, 5), rows(5, len(tensor))])
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor), name
    changed = [n for n in held if n.endswith('weight') and not torch.equal(held[n].float(), reader.read(n).float())]
    assert 'model.layers.0.mlp.down_proj.weight' in changed
    if dtype == 'fp32':
        assert not {'lm_head.weight', 'model.embed_tokens.weight', 'model.norm.weight'} & set(changed)


def test_a_shared_head_stays_as_it_is(tmp_path: Path) -> None:
    folder = make_base(tmp_path / 'base', tied=True)
    base = QuantizedBase(open_weights(folder), QuantizationConfig(), torch.float32, torch.device('cpu'))
    whole = open_weights(folder).read('model.embed_tokens.weight')
    assert torch.equal(base.open('model.embed_tokens.weight')(0, len(whole)), whole)


def test_layers_that_hold_their_weights_transposed(tmp_path: Path) -> None:
    folder = make_gpt2(tmp_path / 'base')
    held = values_in_memory(folder, torch.float32, QuantizationConfig())
    base = QuantizedBase(open_weights(folder), QuantizationConfig(), torch.float32, torch.device('cpu'))
    for name in ('transformer.h.0.attn.c_attn.weight', 'transformer.h.1.mlp.c_proj.weight'):
        rows = base.open(name)(0, held[name].shape[1])
        assert torch.equal(rows, held[name].T)


@pytest.mark.parametrize('value', [torch.inf, torch.nan])
@pytest.mark.parametrize('settings', ['nf4', 'nf4, plain scales'])
def test_a_weight_that_is_not_finite(tmp_path: Path, settings: str, value: float) -> None:
    """bitsandbytes itself says what becomes of it."""
    folder, name = write_internlm(tmp_path / 'base', vocab_size=120, hidden=64), 'model.layers.0.mlp.up_proj.weight'
    (file,) = folder.glob('*.safetensors')
    tensors = load_file(file)
    tensors[name][3, 5] = value
    save_file(tensors, file, {'format': 'pt'})
    base = QuantizedBase(open_weights(folder), SETTINGS[settings], torch.bfloat16, torch.device('cpu'))
    expected = module.requantize(tensors[name].bfloat16(), SETTINGS[settings])
    rows = base.open(name)(0, len(expected))
    assert torch.equal(rows.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize('settings', ['nf4', 'nf4, plain scales', 'fp4'])
@pytest.mark.parametrize('shape', [(96, 80), (3, 80), (5, 7)])
def test_blocks_that_cross_rows(shape: tuple[int, int], settings: str) -> None:
    """As the fused path and the decoder read them; bitsandbytes' own layers on a CPU do not."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    chosen, weight = SETTINGS[settings], torch.randn(shape)
    layer: Any = bnb.nn.Linear4bit(
        shape[1], shape[0], bias=False, quant_type=chosen.quant_type, compress_statistics=chosen.double_quant
    )
    layer.load_state_dict({'weight': weight})
    expected = torch.empty(shape)
    dequantize_into(expected, unpack_weight(layer.to('cpu')))
    torch.testing.assert_close(module.requantize(weight.clone(), chosen), expected)
    assert (expected - weight).abs().mean() < 0.11
