"""Loads a model from a folder or a hub id.

Quantization, attention and remote code are decided only here. Loading is strict: a tensor that is missing, unexpected
or of another shape is an error that names the tensor and its file.
"""

from __future__ import annotations

import importlib.util
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from xtuner.config.schema import QuantizationConfig
from xtuner.errors import ModelError, first_of, one_line
from xtuner.model.check import check_weights
from xtuner.model.families.auto import NATIVE, register
from xtuner.model.hub import read_json, resolve_model
from xtuner.model.load_config import load_config, read_generation_settings
from xtuner.model.quantization import check_bitsandbytes, keep_plain_layout, read_blocks_across_rows
from xtuner.model.sharded_loading import ShardSpec, shard_on_load
from xtuner.model.tokenizer import load_tokenizer
from xtuner.utils.progress import shown_by_transformers

__all__ = [
    'load_config',
    'load_model',
    'load_tokenizer',
    'read_generation_settings',
    'read_json',
    'register',
    'resolve_model',
]

logger = logging.getLogger('xtuner')

register()


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None = None,
    attention: str = 'auto',
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    sharded: bool = False,
    share: ShardSpec | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode onto its device.

    Args:
        path: A folder, a hub id or `modelscope:OWNER/NAME`.
        dtype: Dtype of the weights; with quantization, of unquantized weights and of products.
        quantization: 4 or 8 bits; None keeps the weights unquantized.
        attention: 'auto' (scaled dot product), 'sdpa', 'eager' or 'flash_attention_2'.
        device: None uses the CPU.
        revision: Revision of a hub model; None uses the latest.
        trust_remote_code: Whether a model unknown to transformers may run its own code. InternLM's own code never runs.
        sharded: Whether to store 4-bit weights in `dtype`, as required for sharding them.
        share: Which rows of each linear layer's weight to keep; None: all. A model with a share cannot compute.

    Raises:
        ModelError: No model found, weights that do not fit it, or an unavailable option.
    """
    folder = resolve_model(path, revision=revision, trust_remote_code=trust_remote_code)
    device = torch.device(device or 'cpu')
    config = load_config(folder, trust_remote_code=trust_remote_code)
    native = config.model_type in NATIVE
    _check_no_adapter(folder)
    read_generation_settings(folder)
    arguments: dict[str, Any] = {
        'config': config,
        'dtype': dtype,
        'attn_implementation': _attention(attention),
        'device_map': {'': device},
        'trust_remote_code': trust_remote_code and not native,
    }
    if quantization is not None:
        storage = dtype if sharded else torch.uint8
        arguments['quantization_config'] = bitsandbytes_config(quantization, dtype, device, storage=storage)
    check_weights(folder, config)
    try:
        sharding = nullcontext() if share is None else shard_on_load(share, tied=config.tie_word_embeddings)
        with shown_by_transformers(), sharding:
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    except Exception as error:
        raise ModelError(f'{folder}: the model cannot be loaded: {one_line(error)}') from error
    model, report = loaded
    _check_report(folder, report)
    keep_plain_layout(model)
    read_blocks_across_rows(model)
    return model.eval()


def _check_no_adapter(folder: Path) -> None:
    """Rejects an adapter in the model's folder, which transformers would attach implicitly and without checks."""
    if (folder / 'adapter_config.json').exists():
        raise ModelError(
            f'{folder} contains a model and an adapter (adapter_config.json); put them into separate folders'
        )


def _attention(name: str) -> str:
    if name == 'flash_attention_2' and importlib.util.find_spec('flash_attn') is None:
        raise ModelError("`model.attention` is 'flash_attention_2', but flash_attn is not installed; use 'auto'")
    return 'sdpa' if name == 'auto' else name


def bitsandbytes_config(
    quantization: QuantizationConfig, dtype: torch.dtype, device: torch.device, *, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig:
    """Converts quantization settings for transformers; raises ModelError if a test on the device fails."""
    check_bitsandbytes(quantization.bits, device)
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def _check_report(folder: Path, report: dict[str, Any]) -> None:
    """Raises ModelError if transformers reports missing or unexpected tensors or errors."""
    missing = sorted(report.get('missing_keys') or ())
    surplus = sorted(name for name in report.get('unexpected_keys') or () if not name.endswith('inv_freq'))
    errors = report.get('error_msgs') or ()
    if missing:
        raise ModelError(f'{folder}: tensor {first_of(missing)} is missing')
    if surplus:
        raise ModelError(f'{folder}: tensor {first_of(surplus)} is not part of the model')
    if errors:
        raise ModelError(f'{folder}: {one_line(errors[0])}')
