"""Writes InternLM-7B's exact shape with random weights, in its published format: sharded float16 `.bin` files.

    python benchmarks/internlm_7b.py FOLDER --tokenizer tokenizer.model [--layers 32]

7.32 B parameters in 32 layers, 103,168 words, biases on q, k, v and o; 14.6 GB. Weights are drawn with a deviation of
0.02, biases too, each tensor from a seed of its own, so that threads draw them side by side and every machine the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def draw(number: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The `number`th tensor of the checkpoint."""
    if name.endswith('inv_freq'):
        size = 2 * shape[0]
        return 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)
    if 'norm' in name:
        return torch.ones(shape, dtype=torch.float16)
    generator = torch.Generator().manual_seed(number)
    return torch.empty(shape).normal_(0, 0.02, generator=generator).half()


def plan_shards(config: dict[str, Any]) -> list[list[tuple[int, str, tuple[int, ...]]]]:
    """Number, name and shape of every tensor, shard by shard."""
    shards: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    size = 0
    for number, (name, shape) in enumerate(shapes(config)):
        nbytes = 2 * math.prod(shape)
        if size + nbytes > _SHARD_BYTES and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((number, name, shape))
        size += nbytes
    return shards


def write_checkpoint(folder: Path, tokenizer_model: Path, **changes: Any) -> Path:
    """Writes the folder; `changes` replace fields of the config, such as `num_hidden_layers`."""
    folder.mkdir(parents=True)
    shutil.copyfile(tokenizer_model, folder / 'tokenizer.model')
    config = SHAPE | changes
    shards = plan_shards(config)
    weight_map = {name: number for number, shard in enumerate(shards, 1) for _, name, _ in shard}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for number, shard in enumerate(shards, 1):
            tensors = pool.map(lambda entry: draw(*entry), shard)
            torch.save(dict(zip((name for _, name, _ in shard), tensors, strict=True)), folder / f'{number}.bin')
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
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--tokenizer', type=Path, required=True, help="InternLM's tokenizer.model")
    parser.add_argument('--layers', type=int, default=32)
    args = parser.parse_args()
    write_checkpoint(args.folder, args.tokenizer, num_hidden_layers=args.layers)


if __name__ == '__main__':
    main()
