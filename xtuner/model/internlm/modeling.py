"""InternLM v1: Llama with biases on the attention projections, under its own name."""

from __future__ import annotations

from transformers import LlamaForCausalLM

from xtuner.model.internlm.configuration import InternLMConfig


class InternLMForCausalLM(LlamaForCausalLM):
    """Loads the published checkpoints: parameter names are Llama's, with `bias` beside q, k, v and o."""

    config_class = InternLMConfig
