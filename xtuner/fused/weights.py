"""Concatenated float weights of layers that read the same input, with adapters appended to the inner dimension.

N outputs of all layers, K inputs, R ranks of all adapters. Nothing is cached: a matrix lives for one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xtuner.fused.frozen import Frozen, FrozenLinear, LoraWeights
from xtuner.kernels.dispatch import Kernels

Adapters = Sequence[LoraWeights | None]


def concat_weight_and_b(
    layers: Sequence[Frozen], adapters: Adapters, lora_columns: Sequence[slice | None], ranks: int, kernels: Kernels,
    dtype: torch.dtype, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`[W | s B]`, (N, K + R), which multiplies `[x | x A']`.

    Args:
        layers: The layers whose weights are stacked.
        adapters: One per layer, or None.
        lora_columns: The columns of each layer's adapter among the R; the other columns of its rows are zero.
        ranks: R.
        kernels: Dequantize 4-bit weights.
        dtype: Dtype of the matrix.
        scale: float32 (), divides all entries; None: 1.

    """
    size, device = layers[0].shape[1], layers[0].device
    weight = torch.empty(sum(layer.shape[0] for layer in layers), size + ranks, dtype=dtype, device=device)
    tail, row = weight[:, size:], 0
    filled = len(layers) == 1 and adapters[0] is not None and adapters[0].rank == ranks
    if ranks and not filled:
        tail.view(torch.uint8).zero_() if dtype.itemsize == 1 else tail.zero_()
    for layer, adapter, columns in zip(layers, adapters, lora_columns, strict=True):
        own = slice(row, row + layer.shape[0])
        layer.write_into(weight[own, :size], kernels, scale)
        if adapter and columns:
            if scale is None:
                torch.mul(adapter.b_Nr, adapter.scaling, out=tail[own, columns])
            else:
                tail[own, columns].copy_(adapter.b_Nr * (adapter.scaling / scale))
        row = own.stop
    return weight


def stack_weight_and_a(
    layers: Sequence[Frozen], adapters: Sequence[LoraWeights], kernels: Kernels, dtype: torch.dtype
) -> Tensor:
    """`[W ; A]`, (N + R, K), which `[dy | s dy B]` multiplies."""
    size, device = layers[0].shape[1], layers[0].device
    rows = sum(layer.shape[0] for layer in layers) + sum(a.rank for a in adapters)
    weight, row = torch.empty(rows, size, dtype=dtype, device=device), 0
    for layer in layers:
        layer.write_into(weight[row : row + layer.shape[0]], kernels)
        row += layer.shape[0]
    for adapter in adapters:
        weight[row : row + adapter.rank].copy_(adapter.a_rK)
        row += adapter.rank
    return weight


def stack_weight_and_a_transposed(
    layers: Sequence[FrozenLinear], adapters: Sequence[LoraWeights], kernels: Kernels, dtype: torch.dtype, scale: Tensor
) -> Tensor:
    """`[W ; A]' / scale`, (K, N + R): the transpose of `stack_weight_and_a`, in the layout of FP8 products."""
    size, device = layers[0].shape[1], layers[0].device
    columns = sum(layer.shape[0] for layer in layers) + sum(a.rank for a in adapters)
    weight, row = torch.empty(size, columns, dtype=dtype, device=device), 0
    for layer in layers:
        layer.write_transposed_into(weight[:, row : row + layer.shape[0]], kernels, scale)
        row += layer.shape[0]
    for adapter in adapters:
        weight[:, row : row + adapter.rank].copy_((adapter.a_rK / scale).t())
        row += adapter.rank
    return weight


def bias_of(layers: Sequence[Frozen], dtype: torch.dtype) -> Tensor | None:
    """The concatenated biases, zeros for a layer without one; None if no layer has a bias."""
    biases = [layer.bias(dtype) for layer in layers]
    if all(b is None for b in biases):
        return None
    filled = [
        torch.zeros(layer.shape[0], dtype=dtype, device=layer.device) if b is None else b
        for b, layer in zip(biases, layers, strict=True)
    ]
    return filled[0] if len(filled) == 1 else torch.cat(filled)


def lora_column_slices(adapters: Adapters) -> list[slice | None]:
    """Each layer's columns among the R ranks; None if it has no adapter."""
    columns = iter(columns_of(adapters))
    return [next(columns)[1] if adapter else None for adapter in adapters]


def columns_of(adapters: Adapters) -> list[tuple[LoraWeights, slice]]:
    """Each adapter with its columns among the R ranks."""
    found, column = [], 0
    for adapter in adapters:
        if adapter:
            found.append((adapter, slice(column, column + adapter.rank)))
            column += adapter.rank
    return found


def stack_a(adapters: Adapters, dtype: torch.dtype) -> Tensor:
    """All A matrices, stacked, (R, K)."""
    present = [a.a_rK for a in adapters if a]
    return (present[0] if len(present) == 1 else torch.cat(present)).to(dtype)


def column_factors(adapters: Adapters, like: Tensor) -> Tensor | float:
    """The scaling of each of the R columns; a number if all adapters have the same."""
    present = [a for a in adapters if a]
    if len({a.scaling for a in present}) == 1:
        return present[0].scaling
    return torch.cat([like.new_full((a.rank,), a.scaling) for a in present])
