"""A bitsandbytes 4-bit weight, unpacked into the tensors that a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class QuantizedWeight:
    """The tensors of a 4-bit weight; two codes per byte, the first in the high bits.

    Attributes:
        shape: (N, K).
        packed: uint8, N * K / 2 bytes.
        table: float32 (16,): the values of the 16 codes.
        block: Values per scale.
        absmax: The scale of each block: float32, or uint8 codes if the scales are quantized themselves.
        absmax_table: float32 (256,), the values of those codes; None for float32 scales.
        absmax_scale: float32, one per `absmax_block` scales.
        absmax_block: Scales per coarse scale.
        offset: float32 scalar, the mean that was subtracted from the scales.

    """

    shape: tuple[int, int]
    packed: Tensor
    table: Tensor
    block: int
    absmax: Tensor
    absmax_table: Tensor | None = None
    absmax_scale: Tensor | None = None
    absmax_block: int = 256
    offset: Tensor | None = None

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Returns a range of rows as views.

        Raises:
            ValueError: The range is not aligned with blocks and with groups of scales.

        """
        size = self.shape[1]
        if start * size % (self.block * self.absmax_block) or stop * size % self.block:
            raise ValueError(f'rows {start} to {stop} of {self.shape} are not aligned with blocks of scales')
        first, end = start * size // self.block, stop * size // self.block
        coarse = None if self.absmax_scale is None else self.absmax_scale[first // self.absmax_block :]
        return replace(
            self,
            shape=(stop - start, size),
            packed=self.packed[start * size // 2 : stop * size // 2],
            absmax=self.absmax[first:end],
            absmax_scale=coarse,
        )

    def scales(self) -> Tensor:
        """Returns the scale of each block in float32."""
        if self.absmax_table is None or self.absmax_scale is None or self.offset is None:
            return self.absmax.float()
        coarse = self.absmax_scale.repeat_interleave(self.absmax_block)[: self.absmax.numel()]
        return self.absmax_table[self.absmax.long()] * coarse + self.offset


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is a bitsandbytes 4-bit linear layer whose weight is quantized."""
    state = quant_state_of(module)
    named = type(module).__name__ in ('Linear4bit', 'LinearNF4', 'LinearFP4')
    return isinstance(module, nn.Linear) and named and state is not None  # peft's wrapper has the same name


def quant_state_of(module: Any) -> Any:
    """Quantization state of a 4-bit layer's weight, or of the layer if the weight is sharded; None if unquantized."""
    state = getattr(getattr(module, 'weight', None), 'quant_state', None)
    return state if state is not None else getattr(module, 'quant_state', None)


def unpack_weight(module: nn.Module) -> QuantizedWeight:
    """Unpacks the weight of a bitsandbytes 4-bit linear layer without copying."""
    weight: Any = module.weight
    state = quant_state_of(module)
    packed = weight.data.view(torch.uint8).reshape(-1)
    shape = (int(state.shape[0]), int(state.shape[1]))
    if not state.nested:
        return QuantizedWeight(shape, packed, state.code, state.blocksize, state.absmax)
    inner = state.state2
    return QuantizedWeight(
        shape,
        packed,
        state.code,
        state.blocksize,
        state.absmax,
        inner.code,
        inner.absmax,
        inner.blocksize,
        state.offset,
    )
