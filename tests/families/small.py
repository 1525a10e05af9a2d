"""A small random model of any causal language model that transformers maps, from its default config.

`small_model(kind)` keeps what makes a family (layer pattern, windows, caps, experts, gates) and shrinks its sizes by
the names of its fields. Windows are `WINDOW` and chunks `CHUNK` tokens long, so that samples of a dozen tokens exceed
them; caps and factors on logits are set to values that act.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, WINDOW, CHUNK = 128, 6, 8
MOST_LAYERS = 6

# The first pattern that matches a whole field name gives its value; a function gets the default value.
_RULES: list[tuple[str, Any]] = [
    (r'pad_token_id', 0),
    (r'bos_token_id', 1),
    (r'forced_(bos|eos)_token_id', None),
    (r'(eos|decoder_start)_token_id', 2),
    (r'\w+_token_(id|index)', lambda value: value if value < VOCAB else VOCAB - 1 - value % 8),
    (r'(type|task_type)_vocab_size', lambda value: value),
    (r'\w*vocab(_size)?(_per_layer_input|_base)?', VOCAB),
    (r'(sliding|(local_)?attention)_window(_size|_len)?|(keep_)?window_size|local_attention(_window_len)?', WINDOW),
    (r'attention_chunk_size|floor_scale|(mamba_)?chunk_size', CHUNK),
    (r'(final_logit_softcapping|logits_soft_cap|output_logit_soft_cap)', 3.0),
    (r'attn_logit_softcapping', 5.0),
    (r'logits_scaling', 4.0),
    (r'lm_head_multiplier|logit_scale', 0.5),
    (r'dim_model_base', 16),
    (r'max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_(source|target)_positions', 128),
    (r'model_max_length', 128),
    (r'zero_expert_num', 2),
    (r'nemo_conv_channels|ext_pw_out_channel', 64),
    (r'qk_head_dim', 32),
    (r'index(er)?_n_heads', 16),  # each head's score is cut at 0: with few of them many tokens tie for the top k
    (r'index_block_size', 4),
    (r'index_topk_blocks', 2),
    (r'original_max_position_embeddings', CHUNK),
    (r'use_sliding_window', True),
    (r'max_window_layers', 1),
    (r'block_multiple_of', 16),
    (r'hidden_size_global|adapter_(in|out)_dim|adapter_input_size', 64),
    (r'(\w+_)?head_dim|kv_channels|dim_head|d_head|d_kv|mamba_d_head|mamba_headdim|attention_head_(dim|size)', 16),
    (r'mamba_(num|n)_heads|mamba_d_ssm', lambda value: 8 if value != 1024 else 128),
    (r'(\w+_)?(num|n)_(\w+_)?heads(_per_layer)?|(\w+_)?attention_heads|n_head|num_heads|n_heads|linear_num_heads', 4),
    (r'linear_num_(key|value)_heads', 2),
    (r'\w*_lora_rank|laurel_rank|gated_norm_rank|adapter_rank|hc_lowrank', 16),
    (r'(\w+_)?(intermediate|ffn_hidden)_size(_mlp)?|(\w+_)?ffn_dim|d_ff|dff|dim_ff|ffn_dim|d_inner', 96),
    (r'feed_forward_size', 96),
    (r'(num|n)_(\w+_)?experts|moe_num_experts', 4),
    (r'(num_)?(experts_per_tok(en)?|moe_topk|moe_k)', lambda value: min(value, 2)),
    (r'n_group|num_expert_group', lambda value: min(value, 2)),
    (r'topk_group', 1),
    (r'first_k_dense_replace|num_dense_layers', lambda value: min(value, 1)),
    (r'rotary_dim', 8),
    (r'((attention|backbone)_)?hidden_size|d_model|n_embd|emb(edding)?_(dim|size)', 64),
    (r'(in|out)put_embedding_size|word_embed_proj_dim|lru_width', 64),
    (r'hidden_size_per_layer_input|ple_embed_dim', 16),
    (r'(mamba_)?d_state|ssm_state_size|state_size|mamba_d_state', 8),
    (r'time_step_rank|mamba_dt_rank', 4),
    (r'index_topk', 4),
]  # fmt: skip
_WHEN_UNSET = re.compile(r'head_dim|sliding_window|final_logit_softcapping|attention_chunk_size')
_DEPTHS = re.compile(r'num_(hidden_|encoder_|decoder_)?layers|n_layers?|(en|de)coder_layers')

_ATTENTION = ('sliding_attention', 'full_attention')
_QSA = {'indexer_n_heads': 4, 'indexer_kv_heads': 1, 'indexer_head_dim': 16, 'indexer_budget': 8,
        'indexer_compress_ratio': 4}  # fmt: skip
_DOTS3 = {'per_layer_config': {2: {'num_attention_heads': 2, 'num_key_value_heads': 2, 'kv_lora_rank': 8,
                                   'head_dim': 32, 'qk_nope_head_dim': 16, 'qk_rope_head_dim': 16,
                                   'v_head_dim': 16}}}  # fmt: skip
_ASSISTANT = {'num_hidden_layers': 2, 'num_kv_shared_layers': 2, 'hidden_size_per_layer_input': 0,
              'vocab_size_per_layer_input': 0, 'layer_types': [*_ATTENTION]}  # fmt: skip
_NO_DEFAULT = {'gemma4_assistant'}  # model types whose default config is refused by its own checks
# What the rules cannot know, by model type; of a composite model under its part's name.
OVERRIDES: dict[str, dict[str, Any]] = {
    'bamba': {'attn_layer_indices': [1]},
    'cohere_compass_text': {'rope_parameters': {
        kind: {'rope_type': 'default', 'rope_theta': 1e4, 'mrope_section': [4, 2, 2]} for kind in _ATTENTION}},
    'dbrx': {'attn_config': {'rope_theta': 1e4, 'kv_n_heads': 2, 'clip_qkv': 8.0}},
    'deepseek_v2': {'num_experts_per_tok': 2},
    'dots1': {'n_routed_experts': 4, 'n_shared_experts': 1, 'num_experts_per_tok': 2},
    'dots3_note': {'text_config': _DOTS3},
    'dots3_note_text': _DOTS3,
    'gemma4_assistant': {'text_config': _ASSISTANT},
    'gemma4_unified_assistant': {'text_config': _ASSISTANT},
    'gemma3n_text': {'num_hidden_layers': 4, 'layer_types': [*_ATTENTION] * 2, 'intermediate_size': [96] * 4,
                     'activation_sparsity_pattern': [0.5, 0.0, 0.0, 0.0], 'num_kv_shared_layers': 2},
    'granitemoehybrid': {'layer_types': ['linear_attention', 'full_attention']},
    'jamba': {'attn_layer_period': 2, 'attn_layer_offset': 1},
    'lfm2': {'num_hidden_layers': 2, 'layer_types': ['conv', 'full_attention']},
    'lfm2_moe': {'layer_types': ['conv', 'full_attention']},
    'mamba2': {'num_heads': 8},
    'mimo_v2_flash': {'rope_parameters': {
        kind: {'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5} for kind in _ATTENTION}},
    'nemotron': {'num_key_value_heads': 2},
    'recurrent_gemma': {'num_hidden_layers': 3},
    'reformer': {'is_decoder': True, 'axial_pos_shape': (8, 16), 'axial_pos_embds_dim': (32, 32)},
    'xlstm': {'hidden_size': 128, 'embedding_dim': 128},  # its own two ways to round q's size then agree
    'xmod': {'default_language': 'en_XX'},
    'qwen4_exp': {'text_config': _QSA},
    'qwen4_exp_text': _QSA,
    'zamba': {'num_hidden_layers': 5, 'attention_hidden_size': 128, 'attention_head_dim': 32,
              'layers_block_type': ['linear_attention', 'linear_attention', 'hybrid', 'linear_attention', 'hybrid']},
    'zamba2': {'n_mamba_heads': 8, 'mamba_headdim': 16, 'attention_hidden_size': 128, 'attention_head_dim': 32},
}  # fmt: skip


def small_config(kind: str) -> Any:
    """A config of this model type with small sizes.

    Raises:
        Exception: whatever transformers raises where its default config cannot be built.
    """
    cls, own = CONFIG_MAPPING[kind], OVERRIDES.get(kind, {})
    return cls(**_merged(_shrunk(cls(**own) if kind in _NO_DEFAULT else cls()), own))


def small_model(kind: str) -> Any:
    """A float32 model in evaluation mode on the CPU, whose logits are far from flat and whose norms are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _disturb(name, parameter)
    return model.eval()


def _disturb(name: str, parameter: Tensor) -> None:
    if parameter.dim() == 1 or 'A_log' in name:
        parameter.add_(0.1 * torch.randn_like(parameter))
    else:
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)


def _shrunk(default: Any) -> dict[str, Any]:
    """The fields of a config that a small model has otherwise."""
    fields = {name: value for name, value in vars(default).items() if not name.startswith('_')}
    content: dict[str, Any] = {}
    depths = [value for name, value in fields.items() if _DEPTHS.fullmatch(name) and isinstance(value, int)]
    chosen = _layers(fields, depths[0]) if depths else []
    for name, value in fields.items():
        if hasattr(value, 'model_type'):
            content[name] = {'model_type': value.model_type} | _shrunk(value)
        elif depths and _DEPTHS.fullmatch(name):
            content[name] = len(chosen)
        elif depths and isinstance(value, (list, tuple)) and len(value) == depths[0]:
            content[name] = [_small(name, value[i]) for i in chosen]
        elif name == 'rope_parameters' and isinstance(value, dict):
            content[name] = _small_rope(value)
        elif isinstance(value, (int, float)) or _WHEN_UNSET.fullmatch(name):
            small = _small(name, value)
            if small != value:
                content[name] = small
    if 'use_sliding_window' in fields and 'layer_types' in fields:
        content['layer_types'] = ['full_attention', 'sliding_attention']
    heads, key_heads = fields.get('num_attention_heads'), fields.get('num_key_value_heads')
    if isinstance(heads, int) and isinstance(key_heads, int) and key_heads < heads:
        content['num_key_value_heads'] = min(key_heads, 2)
    return content


def _small(name: str, value: Any) -> Any:
    for pattern, small in _RULES:
        if re.fullmatch(pattern, name):
            return small(value) if callable(small) else small
    return value


def _small_rope(value: dict[str, Any]) -> dict[str, Any]:
    return {k: _small_rope(v) if isinstance(v, dict) else _small(k, v) for k, v in value.items()}


def _layers(fields: dict[str, Any], depth: int) -> list[int]:
    """The first layer of each kind that lists with an entry for each layer distinguish; at least two layers."""
    lists = [value for value in fields.values() if isinstance(value, (list, tuple)) and len(value) == depth]
    rows = list(zip(*lists, strict=True)) if lists else [()] * depth
    first = sorted({rows.index(row) for row in rows})[:MOST_LAYERS]
    return first if len(first) > 1 else list(range(min(2, depth)))


def _merged(content: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = content | own
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            merged[name] = _merged(content[name], value)
    return merged
