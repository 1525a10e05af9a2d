"""Small random models of families that are not ours, from transformers' own classes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {'vocab_size': 97, 'hidden_size': 32, 'intermediate_size': 48, 'num_hidden_layers': 2,
          'num_attention_heads': 4, 'num_key_value_heads': 2, 'head_dim': 8, 'max_position_embeddings': 128,
          'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2, 'tie_word_embeddings': False}  # fmt: skip
NEMO = {'n_embd': 32, 'n_layer': 2, 'n_head': 4, 'n_positions': 128, 'vocab_size': 97}
OWN: dict[str, dict[str, Any]] = {
    'granite': {'logits_scaling': 8.0, 'embedding_multiplier': 12.0, 'residual_multiplier': 0.2},
    'granitemoe': {'logits_scaling': 4.0, 'num_local_experts': 4, 'num_experts_per_tok': 2},
    'cohere': {'logit_scale': 0.0625},
    'cohere2': {'logit_scale': 0.25, 'layer_types': ['sliding_attention', 'full_attention'], 'sliding_window': 64},
    'gemma2': {'final_logit_softcapping': 3.0, 'query_pre_attn_scalar': 8},
    'gemma3_text': {'query_pre_attn_scalar': 8, 'layer_types': ['sliding_attention', 'full_attention']},
    'mixtral': {'num_local_experts': 4, 'num_experts_per_tok': 2},
    'qwen2_moe': {'num_experts': 4, 'num_experts_per_tok': 2, 'moe_intermediate_size': 24,
                  'shared_expert_intermediate_size': 24},
    'minicpm3': {'q_lora_rank': 16, 'kv_lora_rank': 16, 'qk_nope_head_dim': 8, 'qk_rope_head_dim': 4, 'v_head_dim': 8,
                 'dim_model_base': 8, 'scale_emb': 4, 'scale_depth': 1.0, 'num_key_value_heads': 4},
    'gpt2': NEMO,
    'bloom': {'hidden_size': 32, 'n_layer': 2, 'n_head': 4, 'vocab_size': 97},
    'falcon': {'hidden_size': 32, 'num_attention_heads': 4, 'num_hidden_layers': 2, 'vocab_size': 97},
    'mpt': {'d_model': 32, 'n_heads': 4, 'n_layers': 2, 'max_seq_len': 128, 'vocab_size': 97},
    'opt': {'ffn_dim': 48, 'word_embed_proj_dim': 32},
    'mamba': {'vocab_size': 97, 'hidden_size': 32, 'num_hidden_layers': 2, 'state_size': 8},
}  # fmt: skip
PLAIN_FORM = {'gpt2', 'bloom', 'falcon', 'mpt', 'mamba'}  # whose fields have other names
SEPARATE = ('llama', 'mistral', 'qwen2', 'qwen3', 'olmo2', 'phi3', 'gpt_neox', 'granite', 'granitemoe', 'cohere',
            'cohere2', 'gemma', 'gemma2', 'gemma3_text', 'mixtral', 'qwen2_moe', 'minicpm3', 'gpt2')  # fmt: skip
"""Families that tell samples apart by positions that begin anew."""
MIXING = ('bloom', 'falcon', 'mpt', 'opt', 'mamba')
"""Families that do not."""


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in evaluation mode, whose logits are far from flat."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **({} if kind in PLAIN_FORM else COMMON) | OWN.get(kind, {}))
    config.initializer_range = 0.2
    attention = 'eager' if kind in ('gemma2', 'mpt', 'bloom') else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()
