"""InternLM v1's config: Llama's, with attention biases and its own names for the RoPE settings."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

ROTARY_TYPES = ('origin', 'dynamic')


class InternLMConfig(LlamaConfig):
    """Reads the fields that InternLM's published `config.json` adds to Llama's.

    Attributes:
        bias: Whether q, k, v and o have a bias; the MLP never has one.
        rotary: `base` (10000), `type` ('origin': plain RoPE, 'dynamic': dynamic NTK, as in Chat-7B-8k) and
            `scaling_factor` (1.0). None is plain RoPE.

    Raises:
        ValueError: `rotary.type` is unknown.
    """

    model_type = 'internlm'
    bias: bool = True
    rotary: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = self.bias
        self.mlp_bias = False
        kwargs.pop('attention_bias', None)
        rotary = self.rotary or {}
        kind = rotary.get('type', 'origin')
        if kind not in ROTARY_TYPES:
            raise ValueError(f'`rotary.type` of InternLM is {kind!r}; allowed: {", ".join(ROTARY_TYPES)}')
        if 'base' in rotary:
            self.rope_parameters = {'rope_type': 'default', 'rope_theta': float(rotary['base'])}
        super().__post_init__(**kwargs)

    @property
    def ntk_factor(self) -> float | None:
        """The scaling factor of dynamic NTK; None for plain RoPE."""
        rotary = self.rotary or {}
        return float(rotary.get('scaling_factor', 1.0)) if rotary.get('type') == 'dynamic' else None
