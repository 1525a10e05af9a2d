"""Products of linear layers that read the same input, with their adapters, for inference.

Shape letters: T tokens, K inputs, N outputs of all layers together, r rank of an adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.fused.frozen import FrozenLinear, LoraWeights
from xtuner.fused.projections import adapter_of, base_of
from xtuner.fused.weights import bias_of, stack_a
from xtuner.kernels.dispatch import Kernels


class Product:
    """The product of one input with a group of linear layers and their adapters.

    Args:
        projections: The layers, bare or wrapped by peft; they are not changed.
        dtype: Dtype of inputs and outputs.
    """

    def __init__(self, projections: list[Any], dtype: torch.dtype) -> None:
        self.projections, self.dtype = projections, dtype
        self.layers = [FrozenLinear(base_of(projection)) for projection in projections]
        self.num_in = self.layers[0].shape[1]
        self.num_out = sum(layer.shape[0] for layer in self.layers)
        self._float_bytes = self.num_in * self.num_out * dtype.itemsize
        self._merged_weight: Tensor | None = None  # weights and adapters, merged
        self._cached_floats: Tensor | None = None  # dequantized base weights, without adapters
        self._may_cache_floats = False
        self.refresh()

    def refresh(self) -> None:
        """Rereads weights and adapters after they have changed."""
        self._merged_weight = self._cached_floats = None
        self.adapters = [_adapter(projection, self.dtype) for projection in self.projections]
        bias = bias_of(self.layers, self.dtype)
        self.bias = None if bias is None else bias.detach()
        self._is_quantized = all(layer.quantized() is not None for layer in self.layers)
        self._stacked_a = stack_a(self.adapters, self.dtype) if any(self.adapters) else None

    def cache_merged(self, budget_bytes: int) -> int:
        """Merges weights and adapters into one float matrix, if it fits into the budget; returns its size in bytes.

        A single float layer without an adapter is used without a copy.
        """
        weight = self.layers[0].module.weight
        plain = not self._is_quantized and self._stacked_a is None and weight.dtype == self.dtype
        if len(self.layers) == 1 and plain:
            self._merged_weight = weight.detach()
            return 0
        if self._float_bytes > budget_bytes:
            return 0
        both = zip(self.layers, self.adapters, strict=True)
        self._merged_weight = torch.cat([_merge(layer, adapter, self.dtype) for layer, adapter in both])
        return self._float_bytes

    def allow_cached_floats(self, budget_bytes: int) -> int:
        """Caches the weights of a quantized base when they are first dequantized, if they fit into the budget.

        Returns:
            Their size in bytes, or 0.
        """
        self._may_cache_floats = self._is_quantized and self._float_bytes <= budget_bytes
        return self._float_bytes if self._may_cache_floats else 0

    def __call__(self, x_TK: Tensor, kernels: Kernels | None = None, residual: Tensor | None = None) -> Tensor:
        """The outputs of all layers, concatenated, (T, N).

        Args:
            x_TK: The input.
            kernels: Dequantize 4-bit weights; None: plain PyTorch does.
            residual: (T, N), to which the outputs are added in place.
        """
        if self._merged_weight is not None:
            return _linear(x_TK, self._merged_weight, self.bias, residual)
        out = self._base(x_TK, kernels, residual)
        if self._stacked_a is not None:
            inner, row, column = functional.linear(x_TK, self._stacked_a), 0, 0
            for layer, adapter in zip(self.layers, self.adapters, strict=True):
                if adapter:
                    own = inner[:, column : column + adapter.rank]
                    out[:, row : row + layer.shape[0]].addmm_(own, adapter.b_Nr.t(), alpha=adapter.scaling)
                    column += adapter.rank
                row += layer.shape[0]
        return out

    def _base(self, x_TK: Tensor, kernels: Kernels | None, residual: Tensor | None) -> Tensor:
        """The product with the base weights: one for all layers if kernels dequantize them, else one per layer."""
        if kernels is not None and self._is_quantized:
            return _linear(x_TK, self._dequantized(kernels), self.bias, residual)
        matrices = (layer.matrix(self.dtype) for layer in self.layers)
        if len(self.layers) == 1:
            return _linear(x_TK, next(matrices), self.bias, residual)
        out, row = torch.empty(len(x_TK), self.num_out, dtype=self.dtype, device=x_TK.device), 0
        for matrix in matrices:
            torch.mm(x_TK, matrix.t(), out=out[:, row : row + len(matrix)])
            row += len(matrix)
        if self.bias is not None:
            out.add_(self.bias)
        return out if residual is None else residual.add_(out)

    def _dequantized(self, kernels: Kernels) -> Tensor:
        if self._cached_floats is not None:
            return self._cached_floats
        device = self.layers[0].device
        weight, row = torch.empty(self.num_out, self.num_in, dtype=self.dtype, device=device), 0
        for layer in self.layers:
            layer.write_into(weight[row : row + layer.shape[0]], kernels)
            row += layer.shape[0]
        if self._may_cache_floats:
            self._cached_floats = weight
        return weight


def _linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, residual: Tensor | None) -> Tensor:
    if residual is None:
        return functional.linear(x_TK, weight_NK, bias_N)
    if bias_N is None:
        return residual.addmm_(x_TK, weight_NK.t())  # one pass less, and the sum is rounded only once
    return residual.add_(functional.linear(x_TK, weight_NK, bias_N))


def _adapter(projection: Any, dtype: torch.dtype) -> LoraWeights | None:
    """A layer's current adapter, in the dtype of the product; None if there is none, or it is disabled or merged."""
    found = None if getattr(projection, 'merged', False) else adapter_of(projection)
    if found is None:
        return None
    return LoraWeights(found.a_rK.detach().to(dtype), found.b_Nr.detach().to(dtype), found.scaling, 0.0)


def _merge(layer: FrozenLinear, adapter: LoraWeights | None, dtype: torch.dtype) -> Tensor:
    weight = layer.matrix(dtype).detach()
    if adapter is None:
        return weight
    return torch.addmm(weight, adapter.b_Nr, adapter.a_rK, alpha=adapter.scaling)
