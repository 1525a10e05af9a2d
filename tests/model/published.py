"""Small random checkpoints in the forms in which InternLM's are published."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch

from tests.model.test_weights import write

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
}  # fmt: skip


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors under their published names, large enough that a wrong head or position shows."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=make) * scale

    fused = config['model_type'] == 'internlm2'
    key_heads = config.get('num_key_value_heads', HEADS)
    size = HIDDEN // HEADS
    if fused:
        linears = {'attention.wqkv': ((HEADS + 2 * key_heads) * size, HIDDEN), 'attention.wo': (HIDDEN, HIDDEN),
                   'feed_forward.w1': (INTER, HIDDEN), 'feed_forward.w3': (INTER, HIDDEN),
                   'feed_forward.w2': (HIDDEN, INTER)}  # fmt: skip
        norms, names = ('attention_norm', 'ffn_norm'), ('model.tok_embeddings.weight', 'output.weight')
    else:
        linears = {f'self_attn.{p}_proj': (HIDDEN, HIDDEN) for p in 'qkvo'}
        linears |= {'mlp.gate_proj': (INTER, HIDDEN), 'mlp.up_proj': (INTER, HIDDEN), 'mlp.down_proj': (HIDDEN, INTER)}
        norms, names = ('input_layernorm', 'post_attention_layernorm'), ('model.embed_tokens.weight', 'lm_head.weight')
    tensors = {names[0]: normal(VOCAB, HIDDEN, scale=1.0)}
    for i in range(LAYERS):
        for name, shape in linears.items():
            tensors[f'model.layers.{i}.{name}.weight'] = normal(*shape)
            if config['bias'] and ('attn' in name or 'attention' in name):
                tensors[f'model.layers.{i}.{name}.bias'] = normal(shape[0])
        for name in norms:
            tensors[f'model.layers.{i}.{name}.weight'] = 1 + normal(HIDDEN)
    return tensors | {'model.norm.weight': 1 + normal(HIDDEN), names[1]: normal(VOCAB, HIDDEN)}


def write_model(folder: Path, name: str, layout: str = 'bin', *, stray: bool = False) -> Path:
    """Writes config and weights, in a layout of `tests.model.test_weights.write`, with stray buffers if asked."""
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


def write_tokenizer(folder: Path, family: str = 'InternLM') -> Path:
    """Adds a small sentencepiece tokenizer in the published form."""
    trained = BytesIO()
    texts = ['the cat sat on the mat', 'Hello, how are you? I am well!', '<|User|>: <|Bot|>:', '你好 世界'] * 20
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=trained, model_type='bpe', vocab_size=VOCAB, byte_fallback=True,
        normalization_rule_name='identity', add_dummy_prefix=False, remove_extra_whitespaces=False, split_digits=True,
        user_defined_symbols=['<eoh>', '<eoa>'] if family == 'InternLM' else ['[UNUSED_TOKEN_0]', '[UNUSED_TOKEN_1]'],
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
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return folder


def pieces(folder: Path) -> list[str]:
    """The pieces of a folder's tokenizer.model, by id."""
    model = spm.SentencePieceProcessor(str(folder / 'tokenizer.model'))
    return [model.id_to_piece(i) for i in range(len(model))]
