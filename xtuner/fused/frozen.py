"""One frozen linear layer in whatever form its weight has, and one layer's adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.kernels.dequantize import dequantized
from xtuner.kernels.dispatch import Kernels
from xtuner.kernels.quantized import QuantizedWeight, is_4bit, unpack_weight

_ROWS_TOGETHER = 256  # a piece's rows are a multiple of this, which keeps quantised scales whole for any width


@dataclass
class LoraWeights:
    """One layer's adapter as it is now: `y += scaling * B (A dropout(x))`."""

    a_rK: Tensor
    b_Nr: Tensor
    scaling: float
    dropout: float

    @property
    def rank(self) -> int:
        """Its rank r."""
        return self.a_rK.shape[0]


class FrozenLinear:
    """A linear layer of the base model: its weight in whatever form, its bias."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._parts: QuantizedWeight | None = None
        self._parts_of: tuple[int, Any] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.module.out_features, self.module.in_features

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.module.weight.device

    def parts(self) -> QuantizedWeight | None:
        """The 4-bit weight's parts, None for a float weight; looked up again when the weight was replaced."""
        weight = self.module.weight
        now = (weight.data_ptr(), getattr(weight, 'quant_state', None))
        if self._parts_of is None or self._parts_of[0] != now[0] or self._parts_of[1] is not now[1]:
            self._parts_of = now
            self._parts = unpack_weight(self.module) if is_4bit(self.module) else None
        return self._parts

    def write_into(self, out_NK: Tensor, kernels: Kernels, scale: Tensor | None = None) -> None:
        """Writes the weight as floats, over `scale` where one is given."""
        parts, weight = self.parts(), self.module.weight
        if parts is None:
            out_NK.copy_(weight if scale is None else weight / scale)
        else:
            kernels.dequantize_into(out_NK, parts, scale)

    def write_transposed_into(self, out_KN: Tensor, kernels: Kernels, scale: Tensor) -> None:
        """Writes the weight over `scale`, transposed."""
        parts = self.parts()
        if parts is None:
            out_KN.copy_((self.module.weight / scale).t())
        else:
            kernels.dequantize_transposed_into(out_KN, parts, scale)

    def pieces(self, most_bytes: int, item_bytes: int) -> list[tuple[slice, Frozen]]:
        """The layer in pieces of so many bytes as floats at most, each with its rows; whole where it cannot be cut."""
        rows, size = self.shape
        parts = self.parts()
        step = max(1, most_bytes // (size * item_bytes) // _ROWS_TOGETHER) * _ROWS_TOGETHER
        if parts is None or step >= rows or size % parts.block:
            return [(slice(0, rows), self)]
        cuts = [(at, min(at + step, rows)) for at in range(0, rows, step)]
        return [(slice(*cut), FrozenRows(parts.rows(*cut), self, slice(*cut))) for cut in cuts]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight as a float matrix (N, K): the layer's own, or a fresh one."""
        return dequantized(self.module, dtype, self.parts())

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The bias, or None."""
        return None if self.module.bias is None else self.module.bias.to(dtype)


@dataclass(frozen=True)
class FrozenRows:
    """Some rows of a 4-bit layer, for a product in pieces."""

    parts: QuantizedWeight
    layer: FrozenLinear
    rows: slice

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.parts.shape

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.layer.device

    def write_into(self, out_NK: Tensor, kernels: Kernels, scale: Tensor | None = None) -> None:
        """See `FrozenLinear.write_into`."""
        kernels.dequantize_into(out_NK, self.parts, scale)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The rows' bias, or None."""
        bias = self.layer.bias(dtype)
        return None if bias is None else bias[self.rows]


Frozen = FrozenLinear | FrozenRows
