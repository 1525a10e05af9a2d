"""From a folder or a hub id to a tokenizer and a model: the only decision about 4 and 8 bit, and about remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from xtuner.config.schema import QuantizationConfig
from xtuner.errors import ModelError
from xtuner.model.internlm.configuration import InternLMConfig
from xtuner.model.internlm.modeling import InternLMForCausalLM
from xtuner.model.internlm.tokenization import build_tokenizer
from xtuner.model.quantization import keep_plain_layout


def register() -> None:
    """Makes transformers' Auto classes know InternLM."""
    AutoConfig.register('internlm', InternLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(InternLMConfig, InternLMForCausalLM, exist_ok=True)


register()


def resolve_model(path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: the folder itself, or a download."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision))
    except Exception as error:
        raise ModelError(f'model {str(path)!r} is no local folder and cannot be downloaded: {error}') from error


def load_tokenizer(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    folder = resolve_model(path, revision=revision)
    if not (folder / 'tokenizer.json').is_file() and (folder / 'tokenizer.model').is_file():
        return build_tokenizer(folder / 'tokenizer.model')
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype,
    quantization: QuantizationConfig | None = None,
    attention: str = 'auto',
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model of a folder, on its device."""
    folder = resolve_model(path, revision=revision)
    quantized = None
    if quantization is not None:
        quantized = BitsAndBytesConfig(
            load_in_4bit=quantization.bits == 4,
            load_in_8bit=quantization.bits == 8,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        quantization_config=quantized,
        attn_implementation='sdpa' if attention == 'auto' else attention,
        device_map={'': device or 'cpu'},
        trust_remote_code=trust_remote_code,
    )
    keep_plain_layout(model)
    return model
