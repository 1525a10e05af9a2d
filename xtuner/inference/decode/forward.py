"""The forward pass with a static KV cache: for prefill, and for decode steps without a recorded graph.

Shape letters: T new tokens, H hidden size, L tokens in the cache including the new ones, N heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.inference.decode.layers import Heads, Layer
from xtuner.kernels.dispatch import Kernels

PREFILL_CHUNK = 4096  # maximum tokens per forward pass of a prompt; bounds the memory of activations


class KVCache:
    """Keys and values of all layers, in one static tensor.

    Args:
        layers: The decoder's layers.
        capacity: Maximum number of tokens.
        like: A tensor of the same dtype and device.
    """

    def __init__(self, layers: list[Layer], capacity: int, like: Tensor) -> None:
        heads = layers[0].heads
        self.capacity = capacity
        shape = (2 * len(layers), 1, heads.num_keys, capacity, heads.size)
        self.all = torch.empty(shape, dtype=like.dtype, device=like.device)

    def views(self, start: int, end: int) -> tuple[Tensor, ...]:
        """Views of the keys and values of each layer, alternating: (1, N, end - start, D)."""
        return self.all[:, :, :, start:end].unbind(0)


def forward_layers(
    layers: list[Layer],
    x_TH: Tensor,
    cache: KVCache,
    start: int,
    angles: tuple[Tensor, Tensor],
    kernels: Kernels | None,
) -> Tensor:
    """Runs all layers on new tokens.

    Args:
        layers: The decoder's layers.
        x_TH: The new tokens' embeddings; may be overwritten.
        cache: Filled up to `start`; the keys and values of the new tokens are added.
        start: Position of the first new token.
        angles: Cosines and sines of all positions, (capacity, D / 2) each.
        kernels: Fused kernels for norms, attention and the gated activation; None: plain PyTorch.

    Returns:
        The last token's hidden state before the final norm, (1, H).
    """
    attend = _attention(layers[0].heads, x_TH, cache, start, angles, fused=kernels is not None)
    for number, layer in enumerate(layers):
        attended = attend(number, layer.qkv(norm(layer.norm_in, x_TH, kernels), kernels))
        if number == len(layers) - 1:
            x_TH, attended = (
                x_TH[-1:],
                attended[-1:],
            )  # only the last hidden state is needed; keys and values are in the cache
        normed = _add_norm(x_TH, layer.out(attended, kernels), layer.norm_mid, kernels)
        gate_up = layer.gate_up(normed, kernels)
        x_TH = layer.down(_swiglu(gate_up, kernels), kernels, residual=x_TH)
    return x_TH


def _attention(
    heads: Heads, x_TH: Tensor, cache: KVCache, start: int, angles: tuple[Tensor, Tensor], *, fused: bool
) -> Callable[[int, Tensor], Tensor]:
    """Returns attention as a function of a layer's index and its q, k and v, (T, N D); it also fills the cache."""
    length = len(x_TH)
    end = start + length
    rope = angles[0][start:end], angles[1][start:end]
    if fused:
        from xtuner.kernels.triton import prefill_attention

        if prefill_attention.supports(x_TH.dtype, heads.size):

            def attend_with_triton(number: int, qkv: Tensor) -> Tensor:
                """Attention by Triton kernels."""
                qkv = qkv.view(length, heads.groups, -1, heads.size)
                keys, values = cache.all[2 * number, 0], cache.all[2 * number + 1, 0]
                prefill_attention.rope_into_cache(qkv, rope, keys, values, start, queries=heads.queries)
                return prefill_attention.attend(qkv, keys, values, start, heads.scale, queries=heads.queries)

            return attend_with_triton
    new, seen = cache.views(start, end), cache.views(0, end)
    whole = torch.cat((rope[0],) * 2, -1)[:, None, None], torch.cat((-rope[1], rope[1]), -1)[:, None, None]
    mask = None
    if start and length > 1:
        mask = torch.ones(length, end, dtype=torch.bool, device=x_TH.device).tril(start)

    def attend_with_sdpa(number: int, qkv: Tensor) -> Tensor:
        """Attention by PyTorch's `scaled_dot_product_attention`."""
        query, key, value = _apply_rope(qkv.view(length, heads.groups, -1, heads.size), heads, whole)
        new[2 * number].copy_(key)
        new[2 * number + 1].copy_(value)
        attended = functional.scaled_dot_product_attention(
            query, seen[2 * number], seen[2 * number + 1], attn_mask=mask, is_causal=length > 1 and not start,
            scale=heads.scale, enable_gqa=heads.num_queries != heads.num_keys,
        )  # fmt: skip
        return attended.transpose(1, 2).reshape(length, -1)

    return attend_with_sdpa


def norm(module: Any, x_TH: Tensor, kernels: Kernels | None) -> Tensor:
    """RMS norm with the weight of a module."""
    if kernels is None:
        return functional.rms_norm(x_TH, module.weight.shape, module.weight, module.variance_epsilon)
    out = torch.empty_like(x_TH)
    kernels.rms_norm(x_TH, module.weight, module.variance_epsilon, out)
    return out


def _add_norm(x_TH: Tensor, y_TH: Tensor, module: Any, kernels: Kernels | None) -> Tensor:
    """Adds `y` to `x` in place; returns the norm of the sum."""
    if kernels is None:
        return norm(module, x_TH.add_(y_TH), None)
    from xtuner.kernels.triton import prefill_attention

    return prefill_attention.add_norm(x_TH, y_TH, module.weight, module.variance_epsilon)


def _swiglu(gate_up: Tensor, kernels: Kernels | None) -> Tensor:
    if kernels is None:
        gate, up = gate_up.chunk(2, -1)
        return functional.silu(gate).mul_(up)
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=gate_up.dtype, device=gate_up.device)
    kernels.swiglu(gate_up, out)
    return out


def _apply_rope(qkv: Tensor, heads: Heads, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values: (1, N, T, D) each; `rope` holds negated sines in its first half."""
    cut = heads.queries + heads.keys
    both, value = qkv[:, :, :cut], qkv[:, :, cut:]
    wide = both.to(rope[0].dtype)
    both = torch.addcmul(wide * rope[0], wide.roll(heads.size // 2, -1), rope[1]).to(qkv.dtype)
    parts = both[:, :, : heads.queries], both[:, :, heads.queries :], value
    query, key, value = (part.reshape(1, len(qkv), -1, heads.size).transpose(1, 2) for part in parts)
    return query, key, value
