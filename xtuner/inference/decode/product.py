"""Linear layers that read the same input, with their adapters, for inference.

Letters of shapes: T tokens, K inputs, N outputs of all layers side by side, r an adapter's rank.
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
    """What a group of linear layers does to one input.

    Args:
        projections: The layers, each bare or wrapped by peft; only read.
        dtype: Of inputs and outputs.
    """

    def __init__(self, projections: list[Any], dtype: torch.dtype) -> None:
        self.projections, self.dtype = projections, dtype
        self.layers = [FrozenLinear(base_of(projection)) for projection in projections]
        self.num_in = self.layers[0].shape[1]
        self.num_out = sum(layer.shape[0] for layer in self.layers)
        self._float_bytes = self.num_in * self.num_out * dtype.itemsize
        self._kept: Tensor | None = None  # weights and adapters
        self._floats: Tensor | None = None  # a quantised base's weights alone
        self._may_stay = False
        self.refresh()

    def refresh(self) -> None:
        """Looks anew at weights and adapters, which have changed."""
        self._kept = self._floats = None
        self.adapters = [_adapter(projection, self.dtype) for projection in self.projections]
        bias = bias_of(self.layers, self.dtype)
        self.bias = None if bias is None else bias.detach()
        self._quantised = all(layer.parts() is not None for layer in self.layers)
        self._down = stack_a(self.adapters, self.dtype) if any(self.adapters) else None

    def keep(self, budget_bytes: int) -> int:
        """Turns weights and adapters into one float matrix, if it fits; returns the bytes it took.

        A single float layer without an adapter is taken as it is.
        """
        weight = self.layers[0].module.weight
        plain = not self._quantised and self._down is None and weight.dtype == self.dtype
        if len(self.layers) == 1 and plain:
            self._kept = weight.detach()
            return 0
        if self._float_bytes > budget_bytes:
            return 0
        both = zip(self.layers, self.adapters, strict=True)
        self._kept = torch.cat([_merged(layer, adapter, self.dtype) for layer, adapter in both])
        return self._float_bytes

    def keep_floats(self, budget_bytes: int) -> int:
        """Lets a quantised base's weights stay as floats, if they fit, when kernels first turn them into such.

        Returns:
            The bytes they take then.
        """
        self._may_stay = self._quantised and self._float_bytes <= budget_bytes
        return self._float_bytes if self._may_stay else 0

    def __call__(self, x_TK: Tensor, kernels: Kernels | None = None, onto: Tensor | None = None) -> Tensor:
        """All layers' outputs side by side, (T, N); with kernels, 4-bit weights are turned into floats by them.

        Args:
            x_TK: The input.
            kernels: See above.
            onto: (T, N), what the outputs are added to, in place.
        """
        if self._kept is not None:
            return _linear(x_TK, self._kept, self.bias, onto)
        out = self._base(x_TK, kernels, onto)
        if self._down is not None:
            inner, row, column = functional.linear(x_TK, self._down), 0, 0
            for layer, adapter in zip(self.layers, self.adapters, strict=True):
                if adapter:
                    own = inner[:, column : column + adapter.rank]
                    out[:, row : row + layer.shape[0]].addmm_(own, adapter.b_Nr.t(), alpha=adapter.scaling)
                    column += adapter.rank
                row += layer.shape[0]
        return out

    def _base(self, x_TK: Tensor, kernels: Kernels | None, onto: Tensor | None) -> Tensor:
        """The base's part: one product of all layers where their weights have to be turned into floats anyway."""
        if kernels is not None and self._quantised:
            return _linear(x_TK, self._float_weight(kernels), self.bias, onto)
        matrices = (layer.matrix(self.dtype) for layer in self.layers)
        if len(self.layers) == 1:
            return _linear(x_TK, next(matrices), self.bias, onto)
        out, row = torch.empty(len(x_TK), self.num_out, dtype=self.dtype, device=x_TK.device), 0
        for matrix in matrices:
            torch.mm(x_TK, matrix.t(), out=out[:, row : row + len(matrix)])
            row += len(matrix)
        if self.bias is not None:
            out.add_(self.bias)
        return out if onto is None else onto.add_(out)

    def _float_weight(self, kernels: Kernels) -> Tensor:
        if self._floats is not None:
            return self._floats
        device = self.layers[0].device
        weight, row = torch.empty(self.num_out, self.num_in, dtype=self.dtype, device=device), 0
        for layer in self.layers:
            layer.write_into(weight[row : row + layer.shape[0]], kernels)
            row += layer.shape[0]
        if self._may_stay:
            self._floats = weight
        return weight


def _linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, onto: Tensor | None) -> Tensor:
    if onto is None:
        return functional.linear(x_TK, weight_NK, bias_N)
    if bias_N is None:
        return onto.addmm_(x_TK, weight_NK.t())  # one pass less, and the sum is taken before it is rounded
    return onto.add_(functional.linear(x_TK, weight_NK, bias_N))


def _adapter(projection: Any, dtype: torch.dtype) -> LoraWeights | None:
    """A layer's adapter as it is now, in the products' dtype; None where there is none, it is off or it is merged."""
    found = None if getattr(projection, 'merged', False) else adapter_of(projection)
    if found is None:
        return None
    return LoraWeights(found.a_rK.detach().to(dtype), found.b_Nr.detach().to(dtype), found.scaling, 0.0)


def _merged(layer: FrozenLinear, adapter: LoraWeights | None, dtype: torch.dtype) -> Tensor:
    weight = layer.matrix(dtype).detach()
    if adapter is None:
        return weight
    return torch.addmm(weight, adapter.b_Nr, adapter.a_rK, alpha=adapter.scaling)
