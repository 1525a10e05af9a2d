"""A linear layer's weight as a float matrix, whatever form it is stored in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.kernels.quantized import QuantizedWeight, is_4bit, state_of, take_apart
from xtuner.kernels.reference import dequantize_into


def dequantized(module: Any, dtype: torch.dtype, parts: QuantizedWeight | None = None) -> Tensor:
    """A linear layer's weight as a float matrix (N, K): the layer's own where it is one, else a fresh one.

    bitsandbytes' CPU kernel begins a new block at each row, which is wrong where a row is not a whole number of blocks;
    our own reference dequantizes such weights.

    Args:
        module: A linear layer, 4-bit or not.
        dtype: Of the matrix.
        parts: Its weight taken apart, where the caller has it.
    """
    if not is_4bit(module):
        return module.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    state = state_of(module)
    if module.weight.device.type != 'cpu' or state.shape[1] % state.blocksize == 0:
        return dequantize_4bit(module.weight.data, state).to(dtype)
    out = torch.empty((module.out_features, module.in_features), dtype=dtype)
    dequantize_into(out, parts or take_apart(module))
    return out
