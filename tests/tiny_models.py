"""A tiny Llama with biases, 4-bit, under peft: small enough for float64, odd enough to catch a wrong stride."""

import copy
import itertools
import os

import torch
from torch import nn

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def triton_obstacle():
    """Why Triton's kernels cannot be tested here; None where they can."""
    from xtuner.kernels.dispatch import has_triton

    if not has_triton():
        return 'Triton is not installed'
    if not torch.cuda.is_available() and os.environ.get('TRITON_INTERPRET') != '1':
        return 'Triton was imported before its interpreter was asked for; set TRITON_INTERPRET=1'
    return None


def combinations(*values):
    """All combinations on a GPU; in the interpreter, which is slow, a few in which every pair of values occurs."""
    every = list(itertools.product(*values))
    if torch.cuda.is_available():
        return every
    chosen, missing = [], {pair for case in every for pair in _pairs(case)}
    while missing:
        chosen.append(max(every, key=lambda case: len(missing & _pairs(case))))
        missing -= _pairs(chosen[-1])
    return chosen


def _pairs(case):
    return set(itertools.combinations(enumerate(case), 2))


FIELDS: dict[str, dict] = {}
"""By model type, what the config of a tiny model needs besides the sizes below."""


def tiny_model(kind, *, layers=2, heads=4, kv_heads=2, dtype=torch.float32, **fields):
    """A random model of a type that transformers or a spec knows, with norms and biases that are not trivial."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from xtuner.model.families.auto import register

    register()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=64, tie_word_embeddings=False, use_cache=False,
        **(FIELDS.get(kind, {}) | fields),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith('bias'):
                parameter.normal_(std=0.1)
            if 'norm' in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if 'layers' in name and parameter.dim() == 2:
                parameter.mul_(5)
    return model.to(DEVICE)


def tiny_llama(*, bias=True, **sizes):
    return tiny_model('llama', attention_bias=bias, **sizes)


def tiny_internlm2(*, bias=True, **sizes):
    """Its qkv rows are grouped by key head, two query heads each."""
    return tiny_model('internlm2', bias=bias, **sizes)


def quantise(model, dtype=torch.float32):
    """The model's projections in 4 bit, as bitsandbytes keeps them."""
    import bitsandbytes as bnb

    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                args = {'bias': child.bias is not None, 'compute_dtype': dtype, 'quant_type': 'nf4'}
                new = bnb.nn.Linear4bit(child.in_features, child.out_features, **args)
                new.weight = bnb.nn.Params4bit(child.weight.data.contiguous(), requires_grad=False, quant_type='nf4')
                if child.bias is not None:
                    new.bias.data = child.bias.data.clone()
                setattr(parent, name, new.to(child.weight.device))
    model.is_loaded_in_4bit = True  # what makes peft use its 4-bit layer
    return model


def dequantised(model):
    """A float64 copy whose projections are plain layers with exactly the 4-bit weights' values."""
    from bitsandbytes.functional import dequantize_4bit

    from xtuner.kernels.quantized import is_4bit

    def plain(module):
        for name, child in list(module.named_children()):
            if is_4bit(child):
                new = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device=DEVICE)
                new.weight.data = dequantize_4bit(child.weight.data, child.weight.quant_state)
                if child.bias is not None:
                    new.bias.data = child.bias.data.clone()
                setattr(module, name, new.requires_grad_(False))
            else:
                plain(child)

    twin = copy.deepcopy(model)
    plain(twin)
    return twin.double()


def with_adapter(model, *, dropout=0.0, rank=8, targets=None, **kwargs):
    from peft import LoraConfig, get_peft_model

    from xtuner.model.families.find import spec_of

    model.requires_grad_(False)
    every = [path.rsplit('.', 1)[-1] for group in spec_of(model.config).paths.groups for path in group]
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets or every, **kwargs)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if 'lora_B' in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted.to(DEVICE).train()
