"""4-bit weights kept as floats beside their packed form, where memory allows.

Turning them into floats is most of the work of a pass over few tokens; kept, it is done once. The values are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.model.kernels.host import free_host_bytes
from xtuner.model.kernels.quantized import is_4bit

_SHARE = {'cuda': 0.5, 'cpu': 0.25}  # of the free memory


@dataclass(frozen=True)
class Unpacked:
    """How many 4-bit layers there are, how many of them are kept as floats, and what that takes."""

    num_layers: int
    num_kept: int
    num_bytes: int


class _Kept:
    """Stands in for one layer's `forward`."""

    def __init__(self, weight_NK: Tensor, bias: Tensor | None) -> None:
        self.weight_NK, self.bias = weight_NK, bias

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.weight_NK
        return functional.linear(x.to(weight.dtype), weight, self.bias).to(x.dtype)


def unpack_weights(model: nn.Module, budget_bytes: int | None = None) -> Unpacked:
    """Lets 4-bit layers compute with weights kept as floats, one after the other until the budget is spent.

    Args:
        model: Any model, bare or wrapped by peft; its layers' `forward` is replaced on the instance.
        budget_bytes: Memory that may be taken; None: half of what is free on a GPU, a quarter on a CPU.
    """
    from bitsandbytes.functional import dequantize_4bit

    layers: list[Any] = [module for module in model.modules() if is_4bit(module)]
    left = budget_bytes if budget_bytes is not None else _free_bytes(layers)
    kept = taken = 0
    for layer in layers:
        dtype = layer.compute_dtype or layer.weight.quant_state.dtype
        size = layer.weight.quant_state.shape.numel() * dtype.itemsize
        if size > left:
            break
        with torch.no_grad():
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        layer.forward = _Kept(weight, bias)
        kept, taken, left = kept + 1, taken + size, left - size
    return Unpacked(len(layers), kept, taken)


def _free_bytes(layers: list[Any]) -> int:
    if not layers:
        return 0
    device = layers[0].weight.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == 'cuda' else free_host_bytes()
    return int(_SHARE[device.type] * free)
