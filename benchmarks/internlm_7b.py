"""Writes InternLM-7B's exact shape with random weights, in its published format: sharded float16 `.bin` files.

    python benchmarks/internlm_7b.py FOLDER --tokenizer tokenizer.model [--layers 32]

7.32 B parameters in 32 layers, 103,168 words, biases on q, k, v and o; 14.6 GB. Weights are drawn with a deviation of
0.02, biases too, on the GPU where there is one.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE: dict[str, Any] = {
    'architectures': ['InternLMForCausalLM'],
    'auto_map': {
        'AutoConfig': 'configuration_internlm.InternLMConfig',
        'AutoModelForCausalLM': 'modeling_internlm.InternLMForCausalLM',
    },
    'bias': True,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_act': 'silu',
    'hidden_size': 4096,
    'initializer_range': 0.02,
    'intermediate_size': 11008,
    'max_position_embeddings': 2048,
    'model_type': 'internlm',
    'num_attention_heads': 32,
    'num_hidden_layers': 32,
    'pad_token_id': 2,
    'rms_norm_eps': 1e-06,
    'rotary': {'base': 10000, 'type': 'dynamic'},
    'tie_word_embeddings': False,
    'torch_dtype': 'float16',
    'use_cache': True,
    'vocab_size': 103168,
}
TOKENIZER: dict[str, Any] = {
    'auto_map': {'AutoTokenizer': ['tokenization_internlm.InternLMTokenizer', None]},
    'bos_token': '<s>',
    'clean_up_tokenization_spaces': False,
    'eos_token': '</s>',
    'pad_token': '</s>',
    'tokenizer_class': 'InternLMTokenizer',
    'unk_token': '<unk>',
}
_SHARD_BYTES = 2 * 10**9


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Published names and shapes of all tensors."""
    hidden, inner, words = config['hidden_size'], config['intermediate_size'], config['vocab_size']
    yield 'model.embed_tokens.weight', (words, hidden)
    for layer in range(config['num_hidden_layers']):
        prefix = f'model.layers.{layer}'
        for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
            yield f'{prefix}.self_attn.{name}.weight', (hidden, hidden)
            yield f'{prefix}.self_attn.{name}.bias', (hidden,)
        yield f'{prefix}.self_attn.rotary_emb.inv_freq', (hidden // config['num_attention_heads'] // 2,)
        yield f'{prefix}.mlp.gate_proj.weight', (inner, hidden)
        yield f'{prefix}.mlp.up_proj.weight', (inner, hidden)
        yield f'{prefix}.mlp.down_proj.weight', (hidden, inner)
        yield f'{prefix}.input_layernorm.weight', (hidden,)
        yield f'{prefix}.post_attention_layernorm.weight', (hidden,)
    yield 'model.norm.weight', (hidden,)
    yield 'lm_head.weight', (words, hidden)


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith('inv_freq'):
        size = 2 * shape[0]
        return 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)
    if 'norm' in name:
        return torch.ones(shape, dtype=torch.float16)
    device = generator.device
    return torch.empty(shape, dtype=torch.float16, device=device).normal_(0, 0.02, generator=generator).cpu()


def write_checkpoint(folder: Path, tokenizer_model: Path, **changes: Any) -> Path:
    """Writes the folder; `changes` replace fields of the config, such as `num_hidden_layers`."""
    folder.mkdir(parents=True)
    config = SHAPE | changes
    generator = torch.Generator('cuda' if torch.cuda.is_available() else 'cpu').manual_seed(0)
    shards: list[dict[str, Tensor]] = [{}]
    weight_map: dict[str, int] = {}
    size = 0
    for name, shape in shapes(config):
        tensor = draw(name, shape, generator)
        if size + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            _save(folder, len(shards), shards[-1])
            shards[-1] = {}
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        weight_map[name] = len(shards)
        size += tensor.nbytes
    _save(folder, len(shards), shards[-1])
    files = {n: f'pytorch_model-{n:05d}-of-{len(shards):05d}.bin' for n in range(1, len(shards) + 1)}
    for number, file in files.items():
        (folder / f'{number}.bin').rename(folder / file)
    index = {'metadata': {}, 'weight_map': {name: files[number] for name, number in weight_map.items()}}
    for file, content in (
        ('pytorch_model.bin.index.json', index),
        ('config.json', config),
        ('tokenizer_config.json', TOKENIZER),
        ('generation_config.json', {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2}),
    ):
        (folder / file).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    shutil.copyfile(tokenizer_model, folder / 'tokenizer.model')
    return folder


def _save(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, folder / f'{number}.bin')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--tokenizer', type=Path, required=True, help="InternLM's tokenizer.model")
    parser.add_argument('--layers', type=int, default=32)
    args = parser.parse_args()
    write_checkpoint(args.folder, args.tokenizer, num_hidden_layers=args.layers)


if __name__ == '__main__':
    main()
