"""What a model applies to its logits after the output head: a scale, a soft cap, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Field of the config, its power as a factor of the logits, and a prefix of the model types that read it.
_FACTORS = (
    ('logits_scaling', -1, 'granite'),
    ('logits_scaling', 1, 'hyperclovax'),
    ('logit_scale', 1, 'cohere'),
    ('lm_head_multiplier', 1, 'falcon_h1'),
    ('output_multiplier', 1, 'muse'),
    ('logits_mup_width_multiplier', -1, 'inkling'),
)
# Fields c with which logits x become c tanh(x / c), in any family.
_CAPS = ('final_logit_softcapping', 'logits_soft_cap', 'output_logit_soft_cap')


@dataclass(frozen=True)
class LogitRule:
    """Transformation after the head: logits = cap(scale * head(hidden)).

    Attributes:
        scale: Factor.
        cap: Logits x become `cap * tanh(x / cap)`; None: unchanged.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        """Returns the model's logits from those of its head."""
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


def logit_rule(config: Any) -> LogitRule:
    """Returns the rule that a config's fields define.

    Args:
        config: A transformers config; for a composite one, its text model's.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, 'get_text_config') else config
    kind, scale = str(getattr(text, 'model_type', '')), 1.0
    for field, power, family in _FACTORS:
        value = getattr(text, field, None)
        if kind.startswith(family) and value:
            scale *= float(value) ** power
    if kind == 'minicpm3' and getattr(text, 'dim_model_base', None):
        scale *= text.dim_model_base / text.hidden_size
    caps = [float(value) for field in _CAPS if (value := getattr(text, field, None))]
    return LogitRule(scale, caps[0] if caps else None)
