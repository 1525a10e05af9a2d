"""Products of frozen weights and their adapters in FP8 (e4m3), enabled by `runtime.fp8`.

Activations are quantized with one scale per row, weights with one scale for all projections that read the same input:
the exponent of FP8 covers the remaining range. The adapter is appended to the inner dimension, as in bfloat16.
Everything else, including the adapters' gradients, stays in the batch's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xtuner.fused.context import LayerContext, LayerParts
from xtuner.fused.frozen import FrozenLinear
from xtuner.kernels.reference import FP8_MAX

_MULTIPLE = 16  # cuBLAS requires FP8 matrix dimensions to be multiples of it


class WeightScales:
    """Updates the `scale` of every group: the largest magnitude in its weights and adapters over the FP8 maximum.

    The addresses of the scales do not change, so that recorded CUDA graphs can read them.

    Args:
        layers: All layers of the decoder.

    """

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        groups = [group for parts in layers for group in parts.groups]
        self._frozen = torch.stack([torch.stack([largest(w) for w in g.layers]).amax() for g in groups])
        self._scales = torch.empty_like(self._frozen)
        for group, scale in zip(groups, self._scales, strict=True):
            group.scale = scale

    def update(self, layers: Sequence[LayerContext]) -> None:
        """Sets the scales for the current values of the adapters."""
        factors, numbers, matrices = [], [], []
        for number, adapters in enumerate(group for layer in layers for group in layer.adapters):
            for adapter in adapters:
                if adapter:
                    matrices += [adapter.a_rK, adapter.b_Nr]
                    factors += [1.0, abs(adapter.scaling)]
                    numbers += [number, number]
        largest_entries = self._frozen
        if matrices:
            device = largest_entries.device
            norms = torch.stack(torch._foreach_norm(matrices, float('inf'))).float() * torch.tensor(factors).to(device)
            largest_entries = largest_entries.scatter_reduce(0, torch.tensor(numbers).to(device), norms, 'amax')
        torch.div(largest_entries, FP8_MAX, out=self._scales)


def largest(layer: FrozenLinear) -> Tensor:
    """Largest magnitude of a frozen weight, float32 ()."""
    parts = layer.quantized()
    if parts is None:
        return layer.module.weight.abs().amax().float()
    return parts.scales().abs().amax() * parts.table.abs().amax()


def device_unsupported_reason(device: torch.device) -> str | None:
    """Why a device does not support FP8 products, in a few words; None if it does."""
    if device.type != 'cuda':
        return f'device type {device.type} does not support FP8'
    if torch.cuda.get_device_capability(device) < (8, 9):
        return f'{torch.cuda.get_device_name(device)} does not support FP8 (requires compute capability 8.9 or newer)'
    return None


def product_unsupported_reason(layers: Sequence[LayerParts], ranks: Sequence[int], device: torch.device) -> str | None:
    """Why products cannot be computed in FP8, in a few words; None if they can.

    Args:
        layers: All layers of the decoder.
        ranks: Sum of the adapters' ranks, for each group.
        device: Device of the layers.

    """
    if device_unsupported_reason(device):
        return device_unsupported_reason(device)
    wrong = [r for r in ranks if r % _MULTIPLE]
    if wrong:
        return f'the ranks of adapters on the same input sum to {wrong[0]}, not a multiple of {_MULTIPLE}'
    sizes = {size for parts in layers for group in parts.groups for layer in group.layers for size in layer.shape}
    odd = [size for size in sorted(sizes) if size % _MULTIPLE]
    return f'a projection has dimension {odd[0]}, not a multiple of {_MULTIPLE}' if odd else None
