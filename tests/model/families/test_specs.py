"""Every spec compared with its models: families listed in `find.SPECS` are tested automatically."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.fused.test_layer import error, force, step
from tests.tiny_models import DEVICE, dequantised, quantise, tiny_model, with_adapter
from xtuner.convert.to_llama import llama_config, llama_tensors
from xtuner.inference.decode.decoder import SequenceDecoder, find_decoder
from xtuner.inference.generate import Sampling, generate
from xtuner.kernels.dispatch import PLAIN
from xtuner.model.families.find import GENERIC, SPECS, layers_of, spec_of
from xtuner.model.families.spec import attention_window

KINDS = sorted(kind for spec in SPECS for kind in spec.model_types)


@pytest.fixture
def packed():
    """One row: samples of 5, 9 and 3 tokens."""
    ids = torch.randint(3, 97, (1, 17), generator=torch.Generator().manual_seed(1))
    positions = torch.cat((torch.arange(5), torch.arange(9), torch.arange(3)))[None]
    labels = torch.where(positions == 0, -100, ids)
    return {k: v.to(DEVICE) for k, v in (('input_ids', ids), ('position_ids', positions), ('labels', labels))}


@pytest.mark.parametrize('kind', KINDS)
def test_a_spec_describes_its_models(kind):
    model = tiny_model(kind)
    spec, decoder = spec_of(model.config), model.get_decoder()
    assert spec is not GENERIC and spec.mismatch(decoder) is None
    names = dict(model.named_parameters())
    assert spec.embedding in names and spec.head in names
    assert len(layers_of(decoder)) == 2
    linear = {id(module) for module in decoder.layers[0].modules() if isinstance(module, torch.nn.Linear)}
    assert {id(module) for module in spec.paths.projections(decoder.layers[0])} == linear


@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_the_head_s_by_the_spec_s_rule(kind, packed):
    model = tiny_model(kind, dtype=torch.float64)
    inputs = {'input_ids': packed['input_ids'], 'position_ids': packed['position_ids']}
    hidden = model.get_decoder()(**inputs).last_hidden_state
    rule = spec_of(model.config).logits(model.config)
    assert torch.allclose(rule.apply(model.get_output_embeddings()(hidden)), model(**inputs).logits, rtol=1e-12)


@pytest.mark.parametrize('kind', KINDS)
def test_samples_of_a_pack_are_isolated_as_the_spec_says(kind, packed):
    model = tiny_model(kind, dtype=torch.float64)
    assert spec_of(model.config).isolates_packs
    together = model(input_ids=packed['input_ids'], position_ids=packed['position_ids']).logits[0]
    starts = [0, 5, 14, 17]
    for start, end in pairwise(starts):
        alone = model(input_ids=packed['input_ids'][:, start:end]).logits[0]
        assert torch.allclose(together[start:end], alone, rtol=1e-10)


@pytest.mark.parametrize('kind', KINDS)
def test_the_fused_path_s_gradients_equal_float64(kind, packed):
    pytest.importorskip('bitsandbytes')
    model = with_adapter(quantise(tiny_model(kind)))
    exact_loss, exact = step(dequantised(model), packed)
    force(model, PLAIN, fused_lora=True)
    loss, grads = step(model, packed)
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    assert error(grads, exact) < 1e-4  # float32 rounding through two layers


@pytest.mark.parametrize('kind', KINDS)
def test_the_fast_decoder_answers_as_transformers_does(kind):
    model = tiny_model(kind).eval()
    prompt, greedy = [5, 17, 60, 3, 44], Sampling(max_new_tokens=12, temperature=0)
    assert isinstance(find_decoder(model, len(prompt) + 12), SequenceDecoder)
    expected = model.generate(torch.tensor([prompt], device=DEVICE), do_sample=False, max_new_tokens=12, use_cache=True,
                              eos_token_id=None)  # fmt: skip
    assert generate(model, prompt, stop_ids=[], sampling=greedy) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize('kind', [kind for spec in SPECS if spec.llama_fields for kind in spec.model_types])
def test_llama_s_layout_computes_the_same(kind, packed):
    from transformers import LlamaForCausalLM

    model = tiny_model(kind, dtype=torch.float64)
    llama = LlamaForCausalLM(llama_config(model.config)).double().to(DEVICE)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors |= dict(llama_tensors(name, tensor, model.config))
    llama.load_state_dict(tensors)
    inputs = {'input_ids': packed['input_ids'], 'position_ids': packed['position_ids']}
    assert torch.allclose(llama(**inputs).logits, model(**inputs).logits, rtol=1e-12)


@pytest.mark.parametrize('change', ['layer', 'attention', 'norm'])
def test_other_classes_of_modules_are_a_mismatch(change):
    """A model of type `llama` with replaced modules must not take the fused path."""
    decoder = copy.deepcopy(tiny_model('llama').get_decoder())
    layer = decoder.layers[1]
    if change == 'layer':
        layer.__class__ = type('PatchedDecoderLayer', (type(layer),), {})
    elif change == 'attention':
        layer.self_attn.__class__ = type('PatchedAttention', (type(layer.self_attn),), {})
    else:
        del decoder.norm
    reason = spec_of(decoder.config).mismatch(decoder)
    assert reason in (
        'its layers are PatchedDecoderLayer',
        'its attention is PatchedAttention',
        'LlamaModel has no norm',
    )


@pytest.mark.parametrize(
    ('fields', 'window'),
    [({}, None), ({'sliding_window': 4096}, 4096), ({'sliding_window': 4096, 'use_sliding_window': False}, None),
     ({'sliding_window': 8, 'layer_types': ['full_attention', 'sliding_attention']}, 8),
     ({'sliding_window': 8, 'layer_types': ['full_attention']}, None)],
)  # fmt: skip
def test_windows_and_activations_keep_a_model_off_the_fused_paths(fields, window):
    config = SimpleNamespace(hidden_act='silu', **fields)
    assert attention_window(config) == window
    expected = f'its attention has a window of {window} tokens' if window else None
    assert SPECS[0].config_reason(config) == expected
    assert SPECS[0].config_reason(SimpleNamespace(hidden_act='gelu')) == 'its activation is gelu, not silu'
