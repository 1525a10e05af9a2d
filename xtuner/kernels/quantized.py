"""A 4-bit weight of bitsandbytes, taken apart into the tensors that a kernel reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class QuantizedWeight:
    """The parts of a 4-bit weight; two values a byte, the first in the high half.

    Attributes:
        shape: (N, K).
        packed: uint8, N * K / 2 bytes.
        table: float32 (16,): the values of the 16 codes.
        block: How many values share a scale.
        absmax: The scale of each block: float32, or uint8 codes where the scales are quantised themselves.
        absmax_table: float32 (256,), values of those codes; None for float32 scales.
        absmax_scale: float32, one for each `absmax_block` scales.
        absmax_block: How many scales share one.
        offset: float32 scalar, the mean that was taken off the scales.

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
        """Some of the rows, as views.

        Raises:
            ValueError: the rows do not begin and end where blocks and groups of scales do.

        """
        size = self.shape[1]
        if start * size % (self.block * self.absmax_block) or stop * size % self.block:
            raise ValueError(f'rows {start} to {stop} of {self.shape} are no whole blocks of scales')
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
        """The scale of each block in float32."""
        if self.absmax_table is None or self.absmax_scale is None or self.offset is None:
            return self.absmax.float()
        coarse = self.absmax_scale.repeat_interleave(self.absmax_block)[: self.absmax.numel()]
        return self.absmax_table[self.absmax.long()] * coarse + self.offset


def is_4bit(module: nn.Module) -> bool:
    """Whether a module is a bitsandbytes 4-bit linear layer with its weights already quantised."""
    state = state_of(module)
    named = type(module).__name__ in ('Linear4bit', 'LinearNF4', 'LinearFP4')
    return isinstance(module, nn.Linear) and named and state is not None  # peft's own layer has the same name


def state_of(module: Any) -> Any:
    """A 4-bit layer's quantisation state; where its weight is sharded the layer itself has it. None: it has none."""
    state = getattr(getattr(module, 'weight', None), 'quant_state', None)
    return state if state is not None else getattr(module, 'quant_state', None)


def take_apart(module: nn.Module) -> QuantizedWeight:
    """The parts of a bitsandbytes 4-bit linear layer's weight; nothing is copied."""
    weight: Any = module.weight
    state = state_of(module)
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
