"""Weights kept in the form in which they are multiplied soonest, where memory allows.

4-bit weights are kept as floats beside their packed form: turning them into floats is most of the work of a pass over
few tokens; kept, it is done once. On a CPU, float32 weights, these too, are kept as oneDNN lays them out.
The values are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.fused.frozen import FrozenLinear
from xtuner.fused.offload import free_bytes
from xtuner.kernels import cpu_gemm
from xtuner.kernels.quantized import is_4bit

_CACHE_FRACTION = {'cuda': 0.5, 'cpu': 0.25}  # of the free memory
_CPU_CACHE_BYTES = (
    2**24
)  # bytes of a model: read from the processor's cache, weights multiply one row sooner as they are


@dataclass(frozen=True)
class CachedWeights:
    """How many layers might be kept in a better form, how many of them are, and what that takes."""

    num_layers: int
    num_cached: int
    num_bytes: int


def _forward(weight_NK: Tensor, bias: Tensor | None, *, small_model: bool) -> Callable[[Tensor], Tensor]:
    """What stands in for one layer's `forward`."""
    dtype, size = weight_NK.dtype, weight_NK.shape[1]

    def multiply(x: Tensor) -> Tensor:
        """In the weight's dtype; the result in that of `x`."""
        return functional.linear(x.to(dtype), weight_NK, bias).to(x.dtype)

    if not cpu_gemm.can_pack(weight_NK):
        return multiply
    packed, unpacked = cpu_gemm.pack_weight(weight_NK), multiply if small_model else None

    def multiply_packed(x: Tensor) -> Tensor:
        """As `multiply`, by oneDNN; one row by the plain weight where the model is small."""
        if unpacked is not None and x.numel() == size:
            return unpacked(x)
        return cpu_gemm.linear(x.to(dtype), packed, bias).to(x.dtype)

    return multiply_packed


def cache_weights(model: nn.Module, budget_bytes: int | None = None) -> CachedWeights:
    """Lets layers compute with weights kept in a better form, one after the other until the budget is spent.

    Args:
        model: Any model, bare or wrapped by peft, for inference; its layers' `forward` is replaced on the instance, and
            does not see it when their weights change.
        budget_bytes: Memory that may be taken; None: half of what is free on a GPU, a quarter on a CPU.
    """
    layers: list[Any] = [module for module in model.modules() if _is_cacheable(module)]
    sizes = [_size_bytes(layer) for layer in layers]
    budget = budget_bytes or 0
    if budget_bytes is None and layers:
        device = layers[0].weight.device
        budget = int(_CACHE_FRACTION[device.type] * free_bytes(device))
    num_cached = num_bytes = 0
    for layer, size in zip(layers, sizes, strict=True):
        if size > budget:
            break
        weight = _dequantized(layer)
        bias = None if layer.bias is None else layer.bias.detach().to(weight.dtype)
        layer.forward = _forward(weight, bias, small_model=sum(sizes) <= _CPU_CACHE_BYTES)
        num_cached, num_bytes, budget = num_cached + 1, num_bytes + size, budget - size
    return CachedWeights(len(layers), num_cached, num_bytes)


def _is_cacheable(module: nn.Module) -> bool:
    return is_4bit(module) or (type(module) is nn.Linear and cpu_gemm.can_pack(module.weight))


def _size_bytes(layer: Any) -> int:
    shape = layer.weight.quant_state.shape if is_4bit(layer) else layer.weight.shape
    return shape.numel() * _dtype(layer).itemsize


def _dtype(layer: Any) -> torch.dtype:
    return (layer.compute_dtype or layer.weight.quant_state.dtype) if is_4bit(layer) else layer.weight.dtype


@torch.no_grad()
def _dequantized(layer: Any) -> Tensor:
    return FrozenLinear(layer).matrix(_dtype(layer)).detach()
