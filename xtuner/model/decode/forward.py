"""The forward pass over a cache of fixed place: prompts everywhere, and single tokens where no graph is recorded.

Letters of shapes: T new tokens, H hidden, L tokens in the cache with the new ones, N heads, D a head's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.model.decode.layers import Heads, Layer
from xtuner.model.kernels.dispatch import Kernels

LARGEST_CHUNK = 4096  # tokens of a prompt that go through at once; bounds the memory for activations


class Cache:
    """Keys and values of all layers, in one place.

    Args:
        layers: The decoder's layers.
        capacity: Tokens it has room for.
        like: Gives dtype and device.
    """

    def __init__(self, layers: list[Layer], capacity: int, like: Tensor) -> None:
        heads = layers[0].heads
        self.capacity = capacity
        shape = (2 * len(layers), 1, heads.num_keys, capacity, heads.size)
        self.all = torch.empty(shape, dtype=like.dtype, device=like.device)

    def slots(self, start: int, end: int) -> tuple[Tensor, ...]:
        """For each layer, keys and values in turn: (1, N, end - start, D), views."""
        return self.all[:, :, :, start:end].unbind(0)


def advance(
    layers: list[Layer], x_TH: Tensor, cache: Cache, start: int, angles: tuple[Tensor, Tensor], kernels: Kernels | None
) -> Tensor:
    """Runs new tokens through all layers.

    Args:
        layers: The decoder's layers.
        x_TH: The new tokens' embeddings; not changed.
        cache: Filled up to `start`; the new tokens' keys and values are added.
        start: Position of the first new token.
        angles: Cosines and sines of all positions, (capacity, D / 2) each.
        kernels: Fused kernels for norms, rotation and the gate; None takes PyTorch's own.

    Returns:
        The last hidden states before the final norm, (T, H).
    """
    length = len(x_TH)
    end = start + length
    new, seen = cache.slots(start, end), cache.slots(0, end)
    turn = _angles(angles, start, end, fused=kernels is not None)
    mask = None
    if start and length > 1:
        mask = torch.ones(length, end, dtype=torch.bool, device=x_TH.device).tril(start)
    for number, layer in enumerate(layers):
        heads = layer.heads
        qkv = layer.qkv(norm(layer.norm_in, x_TH, kernels), kernels).view(length, heads.groups, -1, heads.size)
        query, key, value = _turned(qkv, heads, turn, kernels)
        new[2 * number].copy_(key)
        new[2 * number + 1].copy_(value)
        attended = functional.scaled_dot_product_attention(
            query, seen[2 * number], seen[2 * number + 1], attn_mask=mask, is_causal=length > 1 and not start,
            scale=heads.scale, enable_gqa=heads.num_queries != heads.num_keys,
        )  # fmt: skip
        x_TH = x_TH + layer.out(attended.transpose(1, 2).reshape(length, -1), kernels)
        gate_up = layer.gate_up(norm(layer.norm_mid, x_TH, kernels), kernels)
        x_TH = x_TH + layer.down(_gated(gate_up, kernels), kernels)
    return x_TH


def norm(module: Any, x_TH: Tensor, kernels: Kernels | None) -> Tensor:
    """RMS norm with a module's weight."""
    if kernels is None:
        return functional.rms_norm(x_TH, module.weight.shape, module.weight, module.variance_epsilon)
    out = torch.empty_like(x_TH)
    kernels.rms_norm(x_TH, module.weight, module.variance_epsilon, out)
    return out


def _gated(gate_up: Tensor, kernels: Kernels | None) -> Tensor:
    if kernels is None:
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    kernels.swiglu(gate_up, out)
    return out


def _angles(angles: tuple[Tensor, Tensor], start: int, end: int, *, fused: bool) -> tuple[Tensor, Tensor]:
    """Of the new tokens: as the fused kernel reads them, or for whole heads, the first half's sines negative."""
    cos, sin = angles[0][start:end], angles[1][start:end]
    if fused:
        return cos, sin
    return torch.cat((cos, cos), -1)[:, None, None], torch.cat((-sin, sin), -1)[:, None, None]


def _turned(
    qkv: Tensor, heads: Heads, turn: tuple[Tensor, Tensor], kernels: Kernels | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys at their positions, and values: (1, N, T, D) each."""
    cut = heads.queries + heads.keys
    both, value = qkv[:, :, :cut], qkv[:, :, cut:]
    if kernels is None:
        half = heads.size // 2
        wide = both.to(turn[0].dtype)
        both = torch.addcmul(wide * turn[0], wide.roll(half, -1), turn[1]).to(qkv.dtype)
    else:
        for group in range(heads.groups):
            kernels.rotate(both[:, group], turn[0], turn[1], both[:, group], inverse=False)
    parts = both[:, :, : heads.queries], both[:, :, heads.queries :], value
    query, key, value = (part.reshape(1, len(qkv), -1, heads.size).transpose(1, 2) for part in parts)
    return query, key, value
