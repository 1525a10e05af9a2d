"""Parts of a fused product: a frozen linear layer, quantized or not, its LoRA adapter, and how they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.kernels.dequantize import dequantized
from xtuner.kernels.dispatch import Kernels
from xtuner.kernels.quantized import QuantizedWeight, is_4bit, unpack_weight

_ROW_MULTIPLE = 256  # rows per chunk are a multiple of it, so that no group of quantization scales is split


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


@dataclass
class LoraWeights:
    """Current values of one layer's adapter: `y += scaling * B (A dropout(x))`."""

    a_rK: Tensor
    b_Nr: Tensor
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a_rK.shape[0]


class FrozenLinear:
    """A linear layer of the base model, with a float or 4-bit weight, and its bias."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._quantized: QuantizedWeight | None = None
        self._quantized_of: tuple[int, Any] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (N, K)."""
        return self.module.out_features, self.module.in_features

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.module.weight.device

    def quantized(self) -> QuantizedWeight | None:
        """The 4-bit weight, None for a float weight; read again if the module's weight has been replaced."""
        weight = self.module.weight
        now = (weight.data_ptr(), getattr(weight, 'quant_state', None))
        if self._quantized_of is None or self._quantized_of[0] != now[0] or self._quantized_of[1] is not now[1]:
            self._quantized_of = now
            self._quantized = unpack_weight(self.module) if is_4bit(self.module) else None
        return self._quantized

    def write_into(self, out_NK: Tensor, kernels: Kernels, scale: Tensor | None = None) -> None:
        """Writes the dequantized weight, divided by `scale` if given."""
        quantized, weight = self.quantized(), self.module.weight
        if quantized is None:
            out_NK.copy_(weight if scale is None else weight / scale)
        else:
            kernels.dequantize_into(out_NK, quantized, scale)

    def write_transposed_into(self, out_KN: Tensor, kernels: Kernels, scale: Tensor) -> None:
        """Writes the dequantized weight, divided by `scale` and transposed."""
        quantized = self.quantized()
        if quantized is None:
            out_KN.copy_((self.module.weight / scale).t())
        else:
            kernels.dequantize_transposed_into(out_KN, quantized, scale)

    def row_chunks(self, max_bytes: int, item_bytes: int) -> list[tuple[slice, Frozen]]:
        """Splits the layer into chunks of at most `max_bytes` when dequantized; one chunk if it cannot be split."""
        rows, size = self.shape
        quantized = self.quantized()
        step = max(1, max_bytes // (size * item_bytes) // _ROW_MULTIPLE) * _ROW_MULTIPLE
        if quantized is None or step >= rows or size % quantized.block:
            return [(slice(0, rows), self)]
        bounds = [(start, min(start + step, rows)) for start in range(0, rows, step)]
        return [(slice(*bound), FrozenRows(quantized.rows(*bound), self, slice(*bound))) for bound in bounds]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight as a float matrix (N, K): the layer's own tensor, or a dequantized copy."""
        return dequantized(self.module, dtype, self.quantized())

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias, or None."""
        return None if self.module.bias is None else self.module.bias.to(dtype)


@dataclass(frozen=True)
class FrozenRows:
    """Some rows of a 4-bit layer, for a product in chunks of rows."""

    parts: QuantizedWeight
    layer: FrozenLinear
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, (N, K)."""
        return self.parts.shape

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.layer.device

    def write_into(self, out_NK: Tensor, kernels: Kernels, scale: Tensor | None = None) -> None:
        """See `FrozenLinear.write_into`."""
        kernels.dequantize_into(out_NK, self.parts, scale)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias of these rows, or None."""
        bias = self.layer.bias(dtype)
        return None if bias is None else bias[self.rows]


Frozen = FrozenLinear | FrozenRows
