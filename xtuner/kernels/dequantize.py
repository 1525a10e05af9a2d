"""Dequantizes a linear layer's weight to a float matrix, whatever its storage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.kernels.quantized import QuantizedWeight, is_4bit, quant_state_of, unpack_weight
from xtuner.kernels.reference import dequantize_into


def dequantized(module: Any, dtype: torch.dtype, parts: QuantizedWeight | None = None) -> Tensor:
    """Returns a linear layer's weight as a float matrix (N, K): a float weight itself, otherwise a new tensor.

    bitsandbytes' CPU kernel starts a new block at each row, which is wrong if a row is not a whole number of blocks;
    the reference kernel dequantizes such weights.

    Args:
        module: A linear layer, 4-bit or not.
        dtype: Dtype of the matrix.
        parts: The unpacked weight, if the caller has it.
    """
    if not is_4bit(module):
        return module.weight.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    state = quant_state_of(module)
    if module.weight.device.type != 'cpu' or state.shape[1] % state.blocksize == 0:
        return dequantize_4bit(module.weight.data, state).to(dtype)
    out = torch.empty((module.out_features, module.in_features), dtype=dtype)
    dequantize_into(out, parts or unpack_weight(module))
    return out
