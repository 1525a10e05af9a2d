"""Writes the demo's untrained base model: InternLM-7B's published format, a thousand times smaller.

    config.json              the published fields with a tiny shape
    generation_config.json
    model.safetensors        random weights with the published names
    tokenizer.model ...      the demo's own vocabulary, see tokenizer.py

Usage: `python demo/base.py FOLDER`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run by path: the parent of the demo folder is not on sys.path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.tokenizer import train_tokenizer

CONVERSATIONS = Path(__file__).with_name('base.jsonl')
VOCAB_SIZE = 2000

CONFIG: dict[str, Any] = {
    'architectures': ['InternLMForCausalLM'],
    'bias': True,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'hidden_act': 'silu',
    'hidden_size': 256,
    'initializer_range': 0.02,
    'intermediate_size': 688,
    'max_position_embeddings': 2048,
    'model_type': 'internlm',
    'num_attention_heads': 4,
    'num_hidden_layers': 4,
    'num_key_value_heads': 4,
    'pad_token_id': 2,
    'rms_norm_eps': 1e-06,
    'rotary': {'base': 10000, 'type': 'dynamic'},
    'tie_word_embeddings': False,
    'torch_dtype': 'float32',
    'use_cache': True,
    'vocab_size': VOCAB_SIZE,
}
"""The fields of InternLM-7B's config.json except `auto_map`, which names code files that this folder lacks."""

GENERATION_CONFIG = {'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 2}


def write_base_model(folder: str | Path, *, seed: int = 0) -> Path:
    """Writes a tiny InternLM with random weights and its tokenizer; the same seed gives the same files.

    Args:
        folder: Output folder; created if missing. `xtuner.model.loading.load_model` and `load_tokenizer` read it.
        seed: Random seed of the weights.

    Returns:
        `folder`.
    """
    import torch

    from xtuner.model.families.internlm.configuration import InternLMConfig
    from xtuner.model.families.internlm.modeling import InternLMForCausalLM
    from xtuner.model.weights.files import write_tensors

    folder = train_tokenizer([CONVERSATIONS], folder, VOCAB_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternLMForCausalLM(InternLMConfig(**CONFIG)).float()
    write_tensors(model.state_dict(), folder / 'model.safetensors', metadata={'format': 'pt'})
    for name, content in (('config.json', CONFIG), ('generation_config.json', GENERATION_CONFIG)):
        (folder / name).write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
    return folder


if __name__ == '__main__':
    print(write_base_model(sys.argv[1] if len(sys.argv) > 1 else 'work_dirs/demo/fresh'))
