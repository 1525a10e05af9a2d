"""InternLM2's and 2.5's config: Llama's, with a bias that the published files call `bias`."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

ROPE_TYPES = ('default', 'dynamic', 'linear')


class InternLM2Config(LlamaConfig):
    """Reads InternLM2's published `config.json`.

    Attributes:
        bias: Whether `wqkv` and `wo` have a bias. The MLP never has one.

    Raises:
        ValueError: `rope_scaling` is neither dynamic nor linear.
    """

    model_type = 'internlm2'
    base_model_tp_plan = {}  # noqa: RUF012  Llama's plans name Llama's modules
    base_model_pp_plan = {}  # noqa: RUF012
    vocab_size: int = 92544
    bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self.attention_bias = self.bias
        self.mlp_bias = False
        super().__post_init__(**kwargs)
        rope: Any = self.rope_parameters
        kind = rope.get('rope_type', 'default')
        if kind not in ROPE_TYPES:
            raise ValueError(f'`rope_scaling.type` of InternLM2 is {kind!r}; allowed: dynamic, linear')

    @property
    def ntk_factor(self) -> float | None:
        """The scaling factor of dynamic NTK; None without it."""
        rope: Any = self.rope_parameters
        return float(rope.get('factor', 1.0)) if rope.get('rope_type') == 'dynamic' else None
