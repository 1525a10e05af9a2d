"""Adapters of every kind on small bases, saved by peft itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCAB = 320


def make_base(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """A two-layer Llama with biases, as a folder; with a tokenizer of the published form."""
    from tests.model.published import write_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        attention_bias=True, tie_word_embeddings=tied, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size='100KB')
    return write_tokenizer(folder)


def make_gpt2(folder: Path) -> Path:
    """A GPT-2, whose linear layers hold their weights transposed and whose output head is its embedding."""
    from tests.model.published import write_tokenizer

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return write_tokenizer(folder)


def save_trained(base: Path, folder: Path, *, resize: int | None = None, seed: int = 1, **settings: Any) -> Any:
    """An adapter whose every trainable number is random, so that none of its parts can be forgotten unnoticed.

    Returns:
        The adapted model, in evaluation mode, float32.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize)
    config = LoraConfig(**({'r': 4, 'lora_alpha': 8, 'target_modules': 'all-linear', 'task_type': 'CAUSAL_LM'}
                           | settings))  # fmt: skip
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted.eval()


KINDS: dict[str, dict[str, Any]] = {
    'LoRA': {},
    'rank-stabilised': {'use_rslora': True},
    'DoRA': {'use_dora': True},
    'rank and alpha by layer': {'rank_pattern': {'q_proj': 2, 'layers.1.mlp.up_proj': 6},
                                'alpha_pattern': {'^model.layers.0.self_attn.k_proj': 3, 'o_proj': 1}},
    'a whole module': {'modules_to_save': ['lm_head']},
    'biases': {'bias': 'lora_only'},
    'all biases': {'bias': 'all', 'target_modules': ['q_proj']},
    'biases of lora_B': {'lora_bias': True, 'target_modules': ['q_proj', 'o_proj']},
    'embedding': {'target_modules': ['embed_tokens', 'v_proj']},
    'embedding, DoRA': {'target_modules': ['embed_tokens', 'v_proj'], 'use_dora': True},
    'output head': {'target_modules': ['lm_head', 'v_proj']},
    'embedding and output head whole': {'modules_to_save': ['embed_tokens', 'lm_head']},
    'tokens': {'trainable_token_indices': [3, 200, 319]},
    'tokens of both': {'trainable_token_indices': {'embed_tokens': [7], 'lm_head': [5, 6]}},
    'resized': {'resize': VOCAB + 9, 'modules_to_save': ['embed_tokens', 'lm_head']},
    'resized, not trained': {'resize': VOCAB + 9},
}  # fmt: skip
TIED: dict[str, dict[str, Any]] = {
    'LoRA': {},
    'output head': {'target_modules': ['lm_head', 'v_proj']},
    'embedding': {'target_modules': ['embed_tokens', 'v_proj']},
    'embedding whole': {'modules_to_save': ['embed_tokens']},
    'tokens': {'trainable_token_indices': [3, 200, 319]},
    'ensured': {'modules_to_save': ['embed_tokens'], 'ensure_weight_tying': True},
    'ensured, low rank': {'target_modules': ['embed_tokens', 'v_proj'], 'ensure_weight_tying': True},
}
GPT2: dict[str, dict[str, Any]] = {
    'LoRA': {'target_modules': ['c_attn', 'c_proj'], 'fan_in_fan_out': True},
    'DoRA': {'target_modules': ['c_attn', 'c_proj'], 'fan_in_fan_out': True, 'use_dora': True},
    'biases': {'target_modules': ['c_attn'], 'fan_in_fan_out': True, 'bias': 'lora_only'},
}
