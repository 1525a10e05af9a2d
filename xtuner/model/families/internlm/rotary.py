"""RoPE whose base grows with the text length (dynamic NTK), recomputed in every call.

    base(n) = base * (factor * n / trained - (factor - 1)) ** (d / (d - 2))     for n > trained, else base

n is the length of the longest text in the batch, d the head size, `trained` the config's `max_position_embeddings`.
With factor 1 this is base * (n / trained) ** (d / (d - 2)): not a no-op.

Shape letters: B rows, S tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class DynamicNTKRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding with stateless dynamic NTK: no call affects the next.

    Args:
        config: A Llama config.
        factor: The scaling factor.
    """

    def __init__(self, config: Any, factor: float) -> None:
        super().__init__(config)
        self.factor = factor

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines at the base of the longest text in the batch.

        Args:
            x: A float tensor that determines dtype and device.
            position_ids: int64 (B, S); the length is the largest one plus 1.

        Returns:
            Two tensors (B, S, D) in x's dtype.
        """
        return self.at_length(x, position_ids, position_ids.max() + 1)

    @torch.no_grad()
    def at_length(self, x: Tensor, position_ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Same as `forward`, for a given text length (int64 scalar)."""
        frequencies = self._frequencies(length.to(x.device))
        angles = position_ids[..., None].float().to(x.device) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    def _frequencies(self, length: Tensor) -> Tensor:
        """float32 (D / 2,). Does not branch on tensor values, which avoids a GPU synchronization."""
        config: Any = self.config
        trained, theta, size = config.max_position_embeddings, config.rope_parameters['rope_theta'], config.head_dim
        growth = ((self.factor * length.double() / trained) - (self.factor - 1)).clamp(min=1)
        grown = (theta * growth ** (size / (size - 2))).float()
        exponents = torch.arange(0, size, 2, dtype=torch.float32, device=length.device) / size
        return torch.where(length > trained, 1.0 / grown**exponents, 1.0 / theta**exponents)
