"""How the matrix products of a batch are computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xtuner.kernels.dispatch import Kernels


@dataclass
class ComputePolicy:
    """Kernels, dtype and memory use of a batch's matrix products.

    Attributes:
        kernels: The kernels to use.
        dtype: Dtype of the products.
        fused_lora: Append adapters to the inner dimension, so that base weight and adapter are one product.
        fp8: Multiply frozen weights and adapters in FP8; `fused_lora` must be off.
        low_memory: Dequantize weights in chunks of rows instead of as a whole, for minimum peak memory.
    """

    kernels: Kernels
    dtype: torch.dtype
    fused_lora: bool
    fp8: bool = False
    low_memory: bool = False

    @property
    def separate_lora(self) -> bool:
        """Whether adapters are separate matrix products."""
        return not self.fused_lora and not self.fp8
