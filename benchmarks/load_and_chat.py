"""Times loading a model in 4 bit, and the first token of `stream_chat` after it.

    python benchmarks/load_and_chat.py WORK_FOLDER --tokenizer FOLDER [--format bin|safetensors] [--layers 32]

Writes a random checkpoint of InternLM-7B's shape in the published form (float16, shards of 2 GB, an index, biases on q,
k, v and o, stray `inv_freq` buffers) into WORK_FOLDER/model, unless it is there, and loads it twice: the first time the
files may have to come from the disk. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from xtuner.config.schema import QuantizationConfig
from xtuner.model.loading import load_model, load_tokenizer

HIDDEN, INTERMEDIATE, HEADS, VOCAB = 4096, 11008, 32, 103168
SHARD_BYTES = 2 * 10**9


def config(num_layers: int) -> dict[str, object]:
    """The published config of InternLM-7B, with so many layers."""
    return {
        'architectures': ['InternLMForCausalLM'], 'model_type': 'internlm', 'bias': True, 'hidden_act': 'silu',
        'hidden_size': HIDDEN, 'intermediate_size': INTERMEDIATE, 'num_attention_heads': HEADS,
        'num_hidden_layers': num_layers, 'vocab_size': VOCAB, 'max_position_embeddings': 2048, 'rms_norm_eps': 1e-6,
        'initializer_range': 0.02, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2,
        'tie_word_embeddings': False, 'torch_dtype': 'float16', 'use_cache': True,
        'auto_map': {'AutoConfig': 'configuration_internlm.InternLMConfig',
                     'AutoModelForCausalLM': 'modeling_internlm.InternLMForCausalLM'},
    }  # fmt: skip


def tensors(num_layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Random float16 tensors under their published names, in order."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device=device, dtype=torch.float16) * 0.02).cpu()

    yield 'model.embed_tokens.weight', normal(VOCAB, HIDDEN)
    for i in range(num_layers):
        block = f'model.layers.{i}.'
        for letter in 'qkvo':
            yield f'{block}self_attn.{letter}_proj.weight', normal(HIDDEN, HIDDEN)
            yield f'{block}self_attn.{letter}_proj.bias', normal(HIDDEN)
        yield f'{block}self_attn.rotary_emb.inv_freq', torch.ones(HIDDEN // HEADS // 2)
        for name in ('gate_proj', 'up_proj'):
            yield f'{block}mlp.{name}.weight', normal(INTERMEDIATE, HIDDEN)
        yield f'{block}mlp.down_proj.weight', normal(HIDDEN, INTERMEDIATE)
        for name in ('input_layernorm', 'post_attention_layernorm'):
            yield f'{block}{name}.weight', torch.ones(HIDDEN, dtype=torch.float16)
    yield 'model.norm.weight', torch.ones(HIDDEN, dtype=torch.float16)
    yield 'lm_head.weight', normal(VOCAB, HIDDEN)


def write_checkpoint(folder: Path, form: str, num_layers: int) -> int:
    """Writes the shards and their index; returns the bytes of all tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix = ('model', 'safetensors') if form == 'safetensors' else ('pytorch_model', 'bin')
    weight_map: dict[str, str] = {}
    total = 0
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f'{stem}-{len(set(weight_map.values())) + 1:05d}.{suffix}'
        save_file(pending, folder / file) if suffix == 'safetensors' else torch.save(pending, folder / file)
        weight_map.update(dict.fromkeys(pending, file))
        pending.clear()

    for name, tensor in tensors(num_layers):
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        pending[name] = tensor
        total += tensor.nbytes
    flush()
    index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
    (folder / f'{stem}.{suffix}.index.json').write_text(json.dumps(index))
    (folder / 'config.json').write_text(json.dumps(config(num_layers)))  # last: its presence means that all is there
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--tokenizer', type=Path, required=True, help='a folder with tokenizer.model')
    parser.add_argument('--format', choices=('bin', 'safetensors'), default='bin')
    parser.add_argument('--layers', type=int, default=32)
    args = parser.parse_args()
    folder = args.folder / 'model'
    if not (folder / 'config.json').is_file():
        write_checkpoint(folder, args.format, args.layers)
        shutil.copyfile(args.tokenizer / 'tokenizer.model', folder / 'tokenizer.model')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    dtype = torch.bfloat16 if device == 'cuda' else torch.float32
    found: dict[str, object] = {'device': torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
                                'format': args.format, 'layers': args.layers}  # fmt: skip
    for attempt in ('first', 'second'):
        started = time.perf_counter()
        tokenizer = load_tokenizer(folder)
        loaded_tokenizer = time.perf_counter()
        model = load_model(folder, dtype=dtype, quantization=QuantizationConfig(), device=device)
        if device == 'cuda':
            torch.cuda.synchronize()
        ready = time.perf_counter()
        stream = model.stream_chat(tokenizer, 'Hello', history=[], max_new_tokens=32)
        next(stream)
        first_token = time.perf_counter()
        num_more = sum(1 for _ in stream)
        found[attempt] = {
            'tokenizer_s': round(loaded_tokenizer - started, 2),
            'model_s': round(ready - loaded_tokenizer, 2),
            'first_token_s': round(first_token - ready, 2),
            'further_responses': num_more,
            'further_s': round(time.perf_counter() - first_token, 2),
        }
        if device == 'cuda':
            found['allocated_gib'] = round(torch.cuda.memory_allocated() / 2**30, 2)
            del model, stream
            torch.cuda.empty_cache()
    print(json.dumps(found))


if __name__ == '__main__':
    main()
