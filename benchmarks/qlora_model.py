"""The models of the QLoRA benchmarks: InternLM-7B's and InternLM2-7B's exact shapes, random weights, 4 bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
INTERNLM2_TARGETS = ['wqkv', 'wo', 'w1', 'w3', 'w2']
SHAPE: dict[str, Any] = {
    'vocab_size': 103168, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'attention_bias': True, 'max_position_embeddings': 8192, 'rms_norm_eps': 1e-6,
    'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2, 'tie_word_embeddings': False,
}  # fmt: skip
INTERNLM2: dict[str, Any] = {
    'vocab_size': 92544, 'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'num_key_value_heads': 8, 'bias': False, 'max_position_embeddings': 32768,
    'rms_norm_eps': 1e-5, 'rope_theta': 1000000, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2,
    'tie_word_embeddings': False,
}  # fmt: skip


def build_base(
    device: str,
    *,
    family: str = 'internlm',
    quantise: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
    **changes: Any,
) -> Any:
    """The base model, frozen, its projections in NF4 with quantised scales.

    InternLM's shape is built of Llama's classes, which the peers know; InternLM2's of our own.

    Args:
        device: Where it goes.
        family: 'internlm' or 'internlm2'.
        quantise: Whether projections are in 4 bit.
        dtype: Of everything else.
        storage: Of the 4-bit weights.
        **changes: To the shape.
    """
    import bitsandbytes as bnb

    model = _on_meta(family, changes, dtype)
    config = model.config
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: torch.Size, std: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)

    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.get_output_embeddings() and quantise:
            new: Any = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_storage=storage,
                device='meta',
            )
            data = random(module.weight.shape, 0.02)
            new.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_type='nf4', quant_storage=storage).to(
                device
            )
            if module.bias is not None:
                new.bias = nn.Parameter(random(module.bias.shape, 0.02), requires_grad=False)
            parent, _, name = path.rpartition('.')
            setattr(model.get_submodule(parent), name, new)
        elif isinstance(module, nn.Linear | nn.Embedding):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(random(parameter.shape, 0.02), requires_grad=False))
        elif type(module).__name__ == 'LlamaRMSNorm':
            weight = torch.ones(module.weight.shape, dtype=dtype, device=device)
            module.weight = nn.Parameter(weight, requires_grad=False)
    model.is_loaded_in_4bit = quantise
    return model


def _on_meta(family: str, changes: dict[str, Any], dtype: torch.dtype) -> Any:
    more: dict[str, Any] = {'dtype': dtype, 'attn_implementation': 'sdpa', 'use_cache': False}
    with torch.device('meta'):
        if family == 'internlm2':
            from xtuner.model.families.internlm2.configuration import InternLM2Config
            from xtuner.model.families.internlm2.modeling import InternLM2ForCausalLM

            return InternLM2ForCausalLM(InternLM2Config(**{**INTERNLM2, **changes}, **more))
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}, **more))


def add_adapter(model: Any, *, dropout: float = 0.0, rank: int = 64) -> Any:
    """The model under a rank-64 adapter on all projections; `lora_B` random, so that no gradient is zero."""
    from peft import LoraConfig, get_peft_model

    targets = INTERNLM2_TARGETS if model.config.model_type == 'internlm2' else TARGETS
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=targets, task_type='CAUSAL_LM')
    model.requires_grad_(False)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if 'lora_B' in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.002)
    return adapted.train()


def set_dropout(model: nn.Module, p: float) -> None:
    """Changes the adapters' dropout of a model that was built with some."""
    for name, module in model.named_modules():
        if '.lora_dropout.' in name and isinstance(module, nn.Dropout):
            module.p = p


def set_checkpointing(model: Any, on: bool) -> None:
    """Switches activation checkpointing."""
    base = model.get_base_model()
    if on:
        base.gradient_checkpointing_enable({'use_reentrant': False})
        base.enable_input_require_grads()
    else:
        base.gradient_checkpointing_disable()
