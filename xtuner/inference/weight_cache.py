"""Caches dequantized (or oneDNN-packed) weights for faster inference, if memory allows.

4-bit weights are dequantized once and cached in addition to their packed form: dequantizing is most of the work of a
forward pass over few tokens. On a CPU, float32 weights, including dequantized ones, are cached in oneDNN's packed
layout. Their values do not change.
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
_CPU_CACHE_BYTES = 2**24  # smaller models stay in the CPU's cache, where unpacked weights multiply one row faster


@dataclass(frozen=True)
class CachedWeights:
    """Number of layers that can be cached, number that are, and the size of the cache in bytes."""

    num_layers: int
    num_cached: int
    num_bytes: int


def _forward(weight_NK: Tensor, bias: Tensor | None, *, small_model: bool) -> Callable[[Tensor], Tensor]:
    """Replacement for the `forward` of one layer."""
    dtype, size = weight_NK.dtype, weight_NK.shape[1]

    def multiply(x: Tensor) -> Tensor:
        """Computes in the dtype of the weight; returns the dtype of `x`."""
        return functional.linear(x.to(dtype), weight_NK, bias).to(x.dtype)

    if not cpu_gemm.can_pack(weight_NK):
        return multiply
    packed, unpacked = cpu_gemm.pack_weight(weight_NK), multiply if small_model else None

    def multiply_packed(x: Tensor) -> Tensor:
        """Same as `multiply`, by oneDNN; a single row of a small model is multiplied by the unpacked weight."""
        if unpacked is not None and x.numel() == size:
            return unpacked(x)
        return cpu_gemm.linear(x.to(dtype), packed, bias).to(x.dtype)

    return multiply_packed


def cache_weights(model: nn.Module, budget_bytes: int | None = None) -> CachedWeights:
    """Caches the weights of a model layer by layer until the budget is used up.

    Args:
        model: Any model for inference, bare or wrapped by peft. The `forward` of its linear layers is replaced on the
            instance; later changes of their weights have no effect.
        budget_bytes: Maximum size of the cache; None: half of the free memory of a GPU, a quarter of that of a CPU.
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
