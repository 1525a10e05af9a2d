"""InternLM3's config: Llama's, with two switches for its biases."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class InternLM3Config(LlamaConfig):
    """Reads InternLM3's published `config.json`.

    Attributes:
        qkv_bias: Whether q, k and v have a bias.
        bias: Whether o and the MLP have a bias.
    """

    model_type = 'internlm3'
    vocab_size: int = 128512
    bias: bool = False
    qkv_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = self.qkv_bias
        self.mlp_bias = self.bias
        super().__post_init__(**kwargs)

    @property
    def ntk_factor(self) -> float | None:
        """The scaling factor of dynamic NTK; None without it."""
        rope: Any = self.rope_parameters
        return float(rope.get('factor', 1.0)) if rope.get('rope_type') == 'dynamic' else None
