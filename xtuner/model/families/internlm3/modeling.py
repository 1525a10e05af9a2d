"""InternLM3: Llama with grouped-query attention, a separate head size, and two switches for biases.

Parameter names are Llama's, so published checkpoints load unchanged.
"""

# transformers types its modules for internal use; mypy's findings on overridden methods can be ignored.
# mypy: disable-error-code="override, misc, assignment, arg-type, type-arg, operator"

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel

from xtuner.model.families.chat_api import ChatMixin
from xtuner.model.families.internlm.rotary import DynamicNTKRotaryEmbedding
from xtuner.model.families.internlm3.configuration import InternLM3Config


class InternLM3Model(LlamaModel):
    """The decoder."""

    config_class = InternLM3Config

    def __init__(self, config: InternLM3Config) -> None:
        super().__init__(config)
        if config.bias != config.qkv_bias:  # Llama has one switch for all four projections
            layers: Any = self.layers
            for layer in layers:
                old = layer.self_attn.o_proj
                layer.self_attn.o_proj = nn.Linear(old.in_features, old.out_features, bias=config.bias)
        if config.ntk_factor is not None:
            self.rotary_emb = DynamicNTKRotaryEmbedding(config, config.ntk_factor)
        self.post_init()


class InternLM3ForCausalLM(ChatMixin, LlamaForCausalLM):
    """The language model with `chat` and `stream_chat`, as on InternLM's model cards."""

    config_class = InternLM3Config
    chat_template_name = 'internlm2_chat'

    def __init__(self, config: InternLM3Config) -> None:
        super(LlamaForCausalLM, self).__init__(config)
        self.model = InternLM3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
