"""Linear layers that read the same input, with their adapters, for inference.

Letters of shapes: T tokens, K inputs, N outputs of all layers side by side, r an adapter's rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.model.kernels.decoder import adapter_of, base_of
from xtuner.model.kernels.dispatch import kernels_for
from xtuner.model.kernels.frozen import Adapter, FrozenLinear


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
        self._kept: Tensor | None = None
        self._bias: Tensor | None = None

    def adapters(self) -> list[Adapter | None]:
        """Each layer's adapter as it is now; None where there is none, it is off or it is merged."""
        return [None if getattr(p, 'merged', False) else adapter_of(p) for p in self.projections]

    def keep(self, budget_bytes: int) -> int:
        """Turns weights and adapters into one float matrix, if it fits; returns the bytes it took.

        A single float layer without an adapter is taken as it is.
        """
        adapters, dtype = self.adapters(), self.dtype
        weight = self.layers[0].module.weight
        self._kept = None
        self._bias = joined_bias(self.layers, dtype)
        if len(self.layers) == 1 and not any(adapters) and self.layers[0].parts() is None and weight.dtype == dtype:
            self._kept = weight.detach()
            return 0
        size = self.num_in * self.num_out * torch.finfo(dtype).bits // 8
        if size > budget_bytes:
            return 0
        self._kept = torch.cat([_merged(layer, a, dtype) for layer, a in zip(self.layers, adapters, strict=True)])
        return size

    def __call__(self, x_TK: Tensor) -> Tensor:
        """All layers' outputs side by side, (T, N)."""
        if self._kept is not None:
            return functional.linear(x_TK, self._kept, self._bias)
        out = torch.empty(len(x_TK), self.num_out, dtype=x_TK.dtype, device=x_TK.device)
        self._multiply(x_TK, out)
        row = 0
        for layer, adapter in zip(self.layers, self.adapters(), strict=True):
            part = out[:, row : row + layer.shape[0]]
            if adapter:
                down = functional.linear(x_TK, adapter.a_rK.to(x_TK.dtype))
                part.addmm_(down, adapter.b_Nr.to(x_TK.dtype).t(), alpha=adapter.scaling)
            row += layer.shape[0]
        return out

    def _multiply(self, x_TK: Tensor, out_TN: Tensor) -> None:
        """The base's part: one product over the weights as floats where they have to be turned into floats anyway."""
        quantised = all(layer.parts() is not None for layer in self.layers)
        groups = [self.layers] if quantised and x_TK.is_cuda else [[layer] for layer in self.layers]
        row = 0
        for group in groups:
            rows = sum(layer.shape[0] for layer in group)
            weight = _side_by_side(group, x_TK) if len(group) > 1 else _matrix(group[0], x_TK)
            bias, part = joined_bias(group, x_TK.dtype), out_TN[:, row : row + rows]
            args = (x_TK, weight.t())
            torch.mm(*args, out=part) if bias is None else torch.addmm(bias, *args, out=part)
            row += rows


def _merged(layer: FrozenLinear, adapter: Adapter | None, dtype: torch.dtype) -> Tensor:
    weight = layer.matrix(dtype).detach()
    if adapter is None:
        return weight
    return torch.addmm(weight, adapter.b_Nr.detach().to(dtype), adapter.a_rK.detach().to(dtype), alpha=adapter.scaling)


def _side_by_side(layers: list[FrozenLinear], like: Tensor) -> Tensor:
    kernels = kernels_for(like.device)
    rows = sum(layer.shape[0] for layer in layers)
    weight = torch.empty(rows, layers[0].shape[1], dtype=like.dtype, device=like.device)
    row = 0
    for layer in layers:
        layer.write_into(weight[row : row + layer.shape[0]], kernels)
        row += layer.shape[0]
    return weight


def _matrix(layer: FrozenLinear, like: Tensor) -> Tensor:
    return _side_by_side([layer], like) if layer.parts() is not None and like.is_cuda else layer.matrix(like.dtype)


def joined_bias(layers: list[FrozenLinear], dtype: torch.dtype) -> Tensor | None:
    """The layers' biases side by side, zeros where one has none; None where none has."""
    biases = [layer.bias(dtype) for layer in layers]
    if all(bias is None for bias in biases):
        return None
    device = layers[0].module.weight.device
    zeros = [torch.zeros(layer.shape[0], dtype=dtype, device=device) for layer in layers]
    joined = [zero if bias is None else bias for bias, zero in zip(biases, zeros, strict=True)]
    return (joined[0] if len(joined) == 1 else torch.cat(joined)).detach()
