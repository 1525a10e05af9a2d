"""InternLM v1's config: Llama's, with biases on the attention projections."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class InternLMConfig(LlamaConfig):
    """Reads the fields that InternLM-7B's published `config.json` adds to Llama's.

    `bias` puts a bias on q, k, v and o, and never on the MLP.
    """

    model_type = 'internlm'
    bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = self.bias
        super().__post_init__(**kwargs)
