"""Small random checkpoints in the forms in which InternLM's are published."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch

from tests.model.weights.test_reader import write

VOCAB, HIDDEN, INTER, LAYERS, HEADS, KEY_HEADS, TRAINED = 320, 32, 48, 2, 4, 2, 24

V1 = {
    'architectures': ['InternLMForCausalLM'],
    'auto_map': {
        'AutoConfig': 'configuration_internlm.InternLMConfig',
        'AutoModel': 'modeling_internlm.InternLMForCausalLM',
        'AutoModelForCausalLM': 'modeling_internlm.InternLMForCausalLM',
    },
    'bias': True, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2, 'hidden_act': 'silu',
    'hidden_size': HIDDEN, 'initializer_range': 0.02, 'intermediate_size': INTER, 'max_position_embeddings': TRAINED,
    'model_type': 'internlm', 'num_attention_heads': HEADS, 'num_hidden_layers': LAYERS, 'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False, 'torch_dtype': 'float32', 'transformers_version': '4.29.2', 'use_cache': True,
    'vocab_size': VOCAB,
}  # fmt: skip
V2 = V1 | {
    'architectures': ['InternLM2ForCausalLM'],
    'auto_map': {key: value.replace('internlm', 'internlm2') for key, value in V1['auto_map'].items()},
    'bias': False, 'model_type': 'internlm2', 'num_key_value_heads': KEY_HEADS, 'rope_theta': 1000000,
    'rope_scaling': None, 'attn_implementation': 'eager', 'transformers_version': '4.41.0', 'pretraining_tp': 1,
}  # fmt: skip
V3 = {key: value for key, value in V2.items() if key not in ('attn_implementation', 'pretraining_tp')} | {
    'architectures': ['InternLM3ForCausalLM'],
    'auto_map': {key: value.replace('internlm', 'internlm3') for key, value in V1['auto_map'].items()},
    'bias': False, 'qkv_bias': False, 'head_dim': 12, 'model_type': 'internlm3', 'rope_theta': 50000000,
    'transformers_version': '4.47.1', 'attention_dropout': 0.0,
    'vocab_size': VOCAB + 8,  # with room for the names behind the pieces
}  # fmt: skip


def _plain(base: float) -> dict:
    return {'reference_rotary': {'base': base}}


CONFIGS = {
    'v1': V1 | _plain(10000),
    'v1-no-bias': V1 | {'bias': False} | _plain(10000),
    'v1-origin': V1 | {'rotary': {'base': 3000, 'type': 'origin'}} | _plain(3000),
    'v1-8k': V1 | {'rotary': {'base': 10000, 'type': 'dynamic'}, 'reference_rotary': {'type': 'dynamic'}},
    'v1-8k-factor': V1 | {'rotary': {'base': 5000, 'type': 'dynamic', 'scaling_factor': 2.5},
                          'reference_rotary': {'base': 5000, 'type': 'dynamic', 'factor': 2.5}},
    'v2': V2 | _plain(1000000),
    'v2-bias': V2 | {'bias': True} | _plain(1000000),
    'v2-multi-head': V2 | {'num_key_value_heads': HEADS} | _plain(1000000),
    'v2-dynamic': V2 | {'rope_scaling': {'type': 'dynamic', 'factor': 2.0},
                        'reference_rotary': {'base': 1000000, 'type': 'dynamic', 'factor': 2.0}},
    'v2-linear': V2 | {'rope_scaling': {'type': 'linear', 'factor': 4.0},
                       'reference_rotary': {'base': 1000000, 'type': 'linear', 'factor': 4.0}},
    'v3': V3 | {'rope_scaling': {'rope_type': 'dynamic', 'factor': 6.0},
                'reference_rotary': {'base': 50000000, 'type': 'dynamic', 'factor': 6.0}},
    'v3-plain': V3 | {'rope_scaling': None} | _plain(50000000),
    'v3-mixed': V3 | {'bias': True, 'rope_scaling': None} | _plain(50000000),
    'v3-bias': V3 | {'bias': True, 'qkv_bias': True, 'rope_scaling': None} | _plain(50000000),
}  # fmt: skip


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors under their published names, large enough that a wrong head or position shows."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=make) * scale

    fused = config['model_type'] == 'internlm2'
    key_heads = config.get('num_key_value_heads', HEADS)
    size = config.get('head_dim') or HIDDEN // HEADS
    biased = ('attn', 'attention') if config['bias'] else ()
    if config['model_type'] == 'internlm3':
        biased = (*('q_proj', 'k_proj', 'v_proj') * config['qkv_bias'], *('o_proj', 'mlp') * config['bias'])
    if fused:
        linears = {'attention.wqkv': ((HEADS + 2 * key_heads) * size, HIDDEN), 'attention.wo': (HIDDEN, HIDDEN),
                   'feed_forward.w1': (INTER, HIDDEN), 'feed_forward.w3': (INTER, HIDDEN),
                   'feed_forward.w2': (HIDDEN, INTER)}  # fmt: skip
        norms, names = ('attention_norm', 'ffn_norm'), ('model.tok_embeddings.weight', 'output.weight')
    else:
        linears = {
            'self_attn.q_proj': (HEADS * size, HIDDEN),
            'self_attn.k_proj': (key_heads * size, HIDDEN),
            'self_attn.v_proj': (key_heads * size, HIDDEN),
            'self_attn.o_proj': (HIDDEN, HEADS * size),
        }
        linears |= {'mlp.gate_proj': (INTER, HIDDEN), 'mlp.up_proj': (INTER, HIDDEN), 'mlp.down_proj': (HIDDEN, INTER)}
        norms, names = ('input_layernorm', 'post_attention_layernorm'), ('model.embed_tokens.weight', 'lm_head.weight')
    vocab = config['vocab_size']
    tensors = {names[0]: normal(vocab, HIDDEN, scale=1.0)}
    for i in range(LAYERS):
        for name, shape in linears.items():
            tensors[f'model.layers.{i}.{name}.weight'] = normal(*shape)
            if any(part in name for part in biased):
                tensors[f'model.layers.{i}.{name}.bias'] = normal(shape[0])
        for name in norms:
            tensors[f'model.layers.{i}.{name}.weight'] = 1 + normal(HIDDEN)
    return tensors | {'model.norm.weight': 1 + normal(HIDDEN), names[1]: normal(vocab, HIDDEN)}


def write_model(folder: Path, name: str, layout: str = 'bin', *, stray: bool = False) -> Path:
    """Writes config and weights, in a layout of `test_reader.write`, with stray buffers if asked."""
    config = CONFIGS[name]
    tensors = random_weights(config)
    if stray:
        tensors |= {f'model.layers.{i}.self_attn.rotary_emb.inv_freq': torch.ones(4) for i in range(LAYERS)}
    write(folder, layout, tensors)
    published = {key: value for key, value in config.items() if key != 'reference_rotary'}
    (folder / 'config.json').write_text(json.dumps(published))
    return folder


def numpy_weights(name: str) -> dict[str, np.ndarray]:
    """The same weights for the reference."""
    return {key: tensor.numpy() for key, tensor in random_weights(CONFIGS[name]).items()}


_DEFINED = {'InternLM': ['<eoh>', '<eoa>'], 'InternLM2': ['[UNUSED_TOKEN_0]', '[UNUSED_TOKEN_1]'], 'InternLM3': []}


def write_tokenizer(folder: Path, family: str = 'InternLM', *, dummy_prefix: bool = False) -> Path:
    """Adds a small sentencepiece tokenizer in the published form."""
    trained = BytesIO()
    texts = ['the cat sat on the mat', 'Hello, how are you? I am well!', '<|User|>: <|Bot|>:', '你好 世界'] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=trained, model_type='bpe', vocab_size=VOCAB, byte_fallback=True,
        normalization_rule_name='identity', add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False,
        split_digits=True, user_defined_symbols=_DEFINED[family],
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'tokenizer.model').write_bytes(trained.getvalue())
    settings = {
        'auto_map': {'AutoTokenizer': [f'tokenization_{family.lower()}.{family}Tokenizer', None]},
        'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '</s>', 'unk_token': '<unk>',
        'clean_up_tokenization_spaces': False, 'tokenizer_class': f'{family}Tokenizer',
    }  # fmt: skip
    if family == 'InternLM2':
        ids = {piece: i for i, piece in enumerate(pieces(folder))}
        names = {'[UNUSED_TOKEN_0]': '<|im_start|>', '[UNUSED_TOKEN_1]': '<|im_end|>'}
        settings['added_tokens_decoder'] = {
            str(ids[old]): {'content': new, 'lstrip': False, 'normalized': False, 'rstrip': False,
                            'single_word': False, 'special': True} for old, new in names.items()
        }  # fmt: skip
        settings['additional_special_tokens'] = list(names.values())
    if family == 'InternLM3':  # its names stand behind the pieces
        settings['added_tokens_decoder'] = {
            str(len(pieces(folder)) + i): {'content': name, 'lstrip': False, 'normalized': False, 'rstrip': False,
                                           'single_word': False, 'special': True}
            for i, name in enumerate(['<|im_start|>', '<|im_end|>'])
        }  # fmt: skip
        settings['additional_special_tokens'] = ['<|im_start|>', '<|im_end|>']
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder


def pieces(folder: Path) -> list[str]:
    """The pieces of a folder's tokenizer.model, by id."""
    model = spm.SentencePieceProcessor(str(folder / 'tokenizer.model'))
    return [model.id_to_piece(i) for i in range(len(model))]
