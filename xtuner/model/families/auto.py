"""Registers this package's model classes with transformers' Auto classes."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from xtuner.model.families.internlm.configuration import InternLMConfig
from xtuner.model.families.internlm.modeling import InternLMForCausalLM, InternLMModel
from xtuner.model.families.internlm.tokenization import InternLMTokenizer
from xtuner.model.families.internlm2.configuration import InternLM2Config
from xtuner.model.families.internlm2.modeling import InternLM2ForCausalLM, InternLM2Model
from xtuner.model.families.internlm2.tokenization import InternLM2Tokenizer
from xtuner.model.families.internlm3.configuration import InternLM3Config
from xtuner.model.families.internlm3.modeling import InternLM3ForCausalLM, InternLM3Model
from xtuner.model.families.internlm3.tokenization import InternLM3Tokenizer

NATIVE = frozenset(config.model_type for config in (InternLMConfig, InternLM2Config, InternLM3Config))  # model types


def register() -> None:
    """Registers InternLM, InternLM2 and InternLM3 with transformers' Auto classes."""
    families: tuple[tuple[Any, Any, Any, Any], ...] = (
        (InternLMConfig, InternLMModel, InternLMForCausalLM, InternLMTokenizer),
        (InternLM2Config, InternLM2Model, InternLM2ForCausalLM, InternLM2Tokenizer),
        (InternLM3Config, InternLM3Model, InternLM3ForCausalLM, InternLM3Tokenizer),
    )
    for config, backbone, model, tokenizer in families:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, backbone, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        AutoTokenizer.register(config, fast_tokenizer_class=tokenizer, exist_ok=True)
