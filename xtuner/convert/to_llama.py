"""Converts InternLM, InternLM2 and InternLM3 to Llama checkpoints, which other tools run without custom code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from xtuner import __version__
from xtuner.convert.folder import copy_companions
from xtuner.convert.output import atomic_folder, check_output
from xtuner.convert.shards import TensorPlan, write_weights
from xtuner.errors import ModelError
from xtuner.model.check import check_weights
from xtuner.model.families import llama
from xtuner.model.families.find import SPECS, spec_of
from xtuner.model.families.internlm2.modeling import split_wqkv
from xtuner.model.families.spec import LLAMA_PATHS, LayerPaths
from xtuner.model.generation_settings import GENERATION_FILE, generation_settings, write_generation_settings
from xtuner.model.loading import load_config, load_tokenizer, resolve_model
from xtuner.model.weights.blocks import row_blocks
from xtuner.model.weights.reader import fingerprint, open_weights

# Fields with the same meaning in both configs.
_SHARED = (
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'head_dim', 'hidden_act', 'attention_bias', 'mlp_bias',
    'max_position_embeddings', 'initializer_range', 'rms_norm_eps', 'use_cache',
    'pad_token_id', 'bos_token_id', 'eos_token_id', 'tie_word_embeddings', 'dtype',
)  # fmt: skip


def to_llama(llm: str, out: Path, *, revision: str | None = None, max_shard_bytes: int = 2 * 10**9) -> Path:
    """Writes a model folder with the same weights under Llama's names, tensor by tensor.

    Args:
        llm: An InternLM model of any generation: a folder, a hub id or `modelscope:OWNER/NAME`.
        out: A missing or empty folder. It appears only once it is complete.
        revision: Revision of a hub model.
        max_shard_bytes: Maximum bytes per .safetensors file, unless a single tensor is larger.

    Returns:
        `out`.

    Raises:
        ModelError: The model cannot be read or is of another family, or `out` is not empty or cannot be written.
    """
    check_output(out)
    base = resolve_model(llm, revision=revision)
    config = load_config(base)
    if spec_of(config).llama_fields is None:
        names = ', '.join(spec.name for spec in SPECS if spec.llama_fields)
        raise ModelError(f'{base} is a model of type {config.model_type!r}; to-llama converts {names}')
    try:
        converted = llama_config(config)
    except ModelError as error:
        raise ModelError(f'{base}: {error}') from None
    check_weights(base, config)
    job = ['to-llama', __version__, fingerprint(open_weights(base)), max_shard_bytes]
    with atomic_folder(out, job) as folder:
        _write(base, config, converted, folder, max_shard_bytes)
    return out


def llama_config(config: Any) -> LlamaConfig:
    """Returns the equivalent Llama config.

    Args:
        config: An `InternLMConfig`, `InternLM2Config` or `InternLM3Config`.
    """
    fields = spec_of(config).llama_fields
    assert fields is not None
    rope = {key: value for key, value in config.rope_parameters.items() if key != 'type'}
    shared = {key: getattr(config, key) for key in _SHARED if hasattr(config, key)} | {'rope_parameters': rope}
    return LlamaConfig(**(shared | dict(fields(config))), architectures=['LlamaForCausalLM'])


def llama_tensors(name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields a published tensor under its Llama name, or names.

    Args:
        name: Its published name.
        tensor: Its value; a fused `wqkv` is split into three.
        config: The published config.
    """
    spec = spec_of(config)
    paths = spec.paths
    assert paths is not None
    whole = {spec.embedding: llama.SPEC.embedding, spec.head: llama.SPEC.head}
    layer, path, kind = _in_layer(name)
    if spec.qkv_by_key_head and (path,) == paths.qkv:
        parts = split_wqkv(tensor, config.num_key_value_heads, config.head_dim)
        for target, part in zip(LLAMA_PATHS.qkv, parts, strict=True):
            yield f'{layer}.{target}.{kind}', part
        return
    renamed = dict(zip(_others(paths), _others(LLAMA_PATHS), strict=True))
    yield f'{layer}.{renamed[path]}.{kind}' if path in renamed else whole.get(name, name), tensor


def _in_layer(name: str) -> tuple[str, str, str]:
    """'model.layers.3.mlp.up_proj.weight' -> ('model.layers.3', 'mlp.up_proj', 'weight'); ('', '', '') elsewhere."""
    match = re.fullmatch(r'(model\.layers\.\d+)\.(.+)\.(weight|bias)', name)
    return (match[1], match[2], match[3]) if match else ('', '', '')


def _others(paths: LayerPaths) -> tuple[str, ...]:
    """A layer's modules other than q, k and v."""
    return (*paths.norms, paths.out, *paths.gate_up, paths.down)


def _write(base: Path, config: Any, converted: LlamaConfig, folder: Path, max_shard_bytes: int) -> None:
    reader = open_weights(base)
    source: dict[str, str] = {}  # published name by Llama name
    plans = []
    for name in reader.names():
        empty = torch.empty(reader.shape(name), dtype=reader.dtype(name), device='meta')
        for llama_name, tensor in llama_tensors(name, empty, config):
            source[llama_name] = name
            plans.append(TensorPlan(llama_name, tuple(tensor.shape), tensor.dtype))

    def blocks(plan: TensorPlan) -> Iterator[Tensor]:
        """See `shards.Blocks`; a tensor that is split or joined is read as a whole."""
        name = source[plan.name]
        if reader.shape(name) == plan.shape:
            yield from (reader.rows(name, start, stop) for start, stop in row_blocks(plan.shape))
        else:
            yield dict(llama_tensors(name, reader.rows(name), config))[plan.name]

    write_weights(folder, plans, max_shard_bytes, blocks)
    converted.save_pretrained(folder)
    check_weights(folder, converted)
    load_tokenizer(base).save_pretrained(folder)
    copy_companions(base, folder)
    if (base / GENERATION_FILE).is_file():
        write_generation_settings(folder, generation_settings(base, None))
