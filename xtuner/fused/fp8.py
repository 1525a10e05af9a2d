"""Frozen weights and their adapters multiplied in FP8 (e4m3), an explicit choice of `runtime.fp8`.

Activations are rounded row by row with a scale a row; weights with one scale for all layers that read the same input,
since FP8's own exponent covers what is left. The adapter is appended to the inner dimension as in bfloat16. Everything
else, the adapters' gradients among it, stays in the batch's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xtuner.fused.context import LayerContext, LayerParts
from xtuner.fused.frozen import FrozenLinear
from xtuner.kernels.reference import FP8_MAX

_MULTIPLE = 16  # of the matrices' sizes, which cuBLAS asks for in FP8


class WeightScales:
    """Keeps every group's `scale` at the largest entry of its weights and adapters over the largest FP8 number.

    The scales stay at their places in memory, where recorded graphs find them.

    Args:
        layers: The decoder's.

    """

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        groups = [group for parts in layers for group in parts.groups]
        self._frozen = torch.stack([torch.stack([largest(w) for w in g.layers]).amax() for g in groups])
        self._scales = torch.empty_like(self._frozen)
        for group, scale in zip(groups, self._scales, strict=True):
            group.scale = scale

    def update(self, runs: Sequence[LayerContext]) -> None:
        """Sets the scales for the adapters as they are now."""
        factors, places, matrices = [], [], []
        for number, adapters in enumerate(group for run in runs for group in run.adapters):
            for adapter in adapters:
                if adapter:
                    matrices += [adapter.a_rK, adapter.b_Nr]
                    factors += [1.0, abs(adapter.scaling)]
                    places += [number, number]
        most = self._frozen
        if matrices:
            device = most.device
            norms = torch.stack(torch._foreach_norm(matrices, float('inf'))).float() * torch.tensor(factors).to(device)
            most = most.scatter_reduce(0, torch.tensor(places).to(device), norms, 'amax')
        torch.div(most, FP8_MAX, out=self._scales)


def largest(layer: FrozenLinear) -> Tensor:
    """The largest magnitude of a frozen weight, float32 ()."""
    parts = layer.parts()
    if parts is None:
        return layer.module.weight.abs().amax().float()
    return parts.scales().abs().amax() * parts.table.abs().amax()


def device_unsupported_reason(device: torch.device) -> str | None:
    """Why a device multiplies nothing in FP8, in a few words; None where it does."""
    if device.type != 'cuda':
        return f'a {device.type} has no FP8 units'
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f'{torch.cuda.get_device_name(device)} has no FP8 units (compute capability 8.9 or newer has)'
    return None


def product_unsupported_reason(layers: Sequence[LayerParts], ranks: Sequence[int], device: torch.device) -> str | None:
    """Why products cannot be in FP8 here, in a few words; None where they can.

    Args:
        layers: The decoder's.
        ranks: Sum of the adapters' ranks of each group.
        device: Where they are.

    """
    if device_unsupported_reason(device):
        return device_unsupported_reason(device)
    wrong = [r for r in ranks if r % _MULTIPLE]
    if wrong:
        return f'the ranks of adapters on the same input sum to {wrong[0]}, which is no multiple of {_MULTIPLE}'
    sizes = {size for parts in layers for group in parts.groups for layer in group.layers for size in layer.shape}
    odd = [size for size in sorted(sizes) if size % _MULTIPLE]
    return f'a projection has a side of {odd[0]}, which is no multiple of {_MULTIPLE}' if odd else None
