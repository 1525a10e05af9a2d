"""One decoder layer of a Llama-like model as one autograd function: forward, backward, and the saved activations.

Without checkpointing these are saved: the layer's input, the rotated q, k and v, the attention's output, the hidden
states between attention and MLP (`middle`), gate and up. Norms and the gated activation are recomputed in the backward
pass: each is one pass over its rows. With checkpointing only the input is saved; the last product (`down`) is never
recomputed, because nothing needs its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.fused.context import LayerContext, LayerParts
from xtuner.fused.frozen import ComputePolicy


@dataclass
class SavedActivations:
    """What the backward pass needs of one layer's forward pass.

    Attributes:
        middle: (T, H), hidden states between attention and MLP.
        gate_up: (T, 2 I or more), outputs of the gate and up projections.
        scaled: `s x A'` of each group, see `LinearGroup.forward`; None: not computed yet.
        attention: None: recomputed when the backward pass needs it.
    """

    middle: Tensor
    gate_up: Tensor
    scaled: list[Tensor | None]
    attention: SavedAttention | None = None


@dataclass
class SavedAttention:
    """Rotated q, k and v, and the output of attention with its own autograd graph."""

    qkv: Tensor
    heads: tuple[Tensor, Tensor, Tensor]
    out: Tensor


def layer_forward(layer: LayerContext, x_TH: Tensor, *, differentiable: bool) -> tuple[Tensor, SavedActivations]:
    """Computes a layer.

    Args:
        layer: The layer in its batch.
        x_TH: The layer's input.
        differentiable: Whether attention saves what its backward pass needs.

    Returns:
        The output, (T, H), and the saved activations.
    """
    saved = recompute_layer(layer, x_TH, None, None, differentiable=differentiable)
    parts, policy = layer.parts, layer.batch.policy
    size = parts.down.num_in
    act = torch.empty(len(x_TH), size + layer.ranks(3), dtype=policy.dtype, device=x_TH.device)
    policy.kernels.swiglu(saved.gate_up[:, : 2 * size], act[:, :size])
    update, saved.scaled[3] = parts.down.forward(policy, act, layer.adapters[3], layer.seeds(3))
    return _add(update, saved.middle), saved


def recompute_layer(
    layer: LayerContext, x_TH: Tensor, middle: Tensor | None, gate_up: Tensor | None, *, differentiable: bool = True
) -> SavedActivations:
    """Recomputes a layer without its last product, except for `middle` and `gate_up` if they are given.

    If `middle` is given, attention is not recomputed here, but after the backward pass of the MLP.
    """
    parts, policy = layer.parts, layer.batch.policy
    scaled: list[Tensor | None] = [None] * 4
    attention = None
    if middle is None:
        attention = _attend(layer, x_TH, scaled, differentiable=differentiable)
        wide = _widen(layer, 1, attention.out.detach())
        update, scaled[1] = parts.out.forward(policy, wide, layer.adapters[1], layer.seeds(1))
        del wide
        middle = _add(update, x_TH)
    if gate_up is None:
        normed, _ = _norm(layer, 2, parts.norm_mid, middle)
        extra_columns = layer.ranks(2)
        gate_up, scaled[2] = parts.gate_up.forward(
            policy, normed, layer.adapters[2], layer.seeds(2), extra_columns=extra_columns
        )
    return SavedActivations(middle, gate_up, scaled, attention)


def _attend(
    layer: LayerContext, x_TH: Tensor, scaled: list[Tensor | None], *, differentiable: bool = True
) -> SavedAttention:
    parts, policy = layer.parts, layer.batch.policy
    normed, _ = _norm(layer, 0, parts.norm_in, x_TH)
    qkv, scaled[0] = parts.qkv.forward(policy, normed, layer.adapters[0], layer.seeds(0))
    del normed
    qkv = _rotated(layer, qkv)
    q, k, v = (t.detach().requires_grad_(differentiable) for t in _heads(parts, qkv))
    with torch.set_grad_enabled(differentiable):
        out = layer.batch.attention.forward(q, k, v, parts.scale)
    return SavedAttention(qkv, (q, k, v), out)


def layer_backward(
    layer: LayerContext, x_TH: Tensor, dout_TH: Tensor, saved: SavedActivations, *, need_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients with respect to a layer's input and its adapters, A and B in the order of the groups.

    Overwrites the saved activations.
    """
    dmiddle, mlp_grads = _mlp_backward(layer, dout_TH, saved)
    parts, policy = layer.parts, layer.batch.policy
    saved.middle = torch.empty(0)
    attention = saved.attention or _attend(layer, x_TH, saved.scaled)
    wide = _widen(layer, 1, dmiddle.to(policy.dtype))
    dattended, dxa = parts.out.input_grad(policy, wide, layer.adapters[1], layer.seeds(1))
    attended = attention.out.detach()
    scaled = _scaled(layer, 1, saved, attended)
    out_grads = parts.out.weight_grads(policy, wide, attended, scaled, dxa, layer.adapters[1], layer.seeds(1))
    del wide, attended
    dqkv = _attention_backward(layer, attention, dattended)
    del dattended
    normed, rstd = _norm(layer, 0, parts.norm_in, x_TH)
    dnormed, dxa = parts.qkv.input_grad(policy, dqkv, layer.adapters[0], layer.seeds(0), need_dx=need_dx)
    source = normed[:, : parts.qkv.num_in]
    scaled = _scaled(layer, 0, saved, source)
    qkv_grads = parts.qkv.weight_grads(policy, dqkv, source, scaled, dxa, layer.adapters[0], layer.seeds(0))
    dx = None
    if dnormed is not None:
        spare = layer.ranks(3)  # for the preceding layer, whose output gradient this is
        dx = policy.kernels.rms_norm_backward(dnormed, x_TH, rstd, parts.norm_in.weight, dmiddle, spare=spare)
    return dx, qkv_grads + out_grads + mlp_grads


def _mlp_backward(layer: LayerContext, dout_TH: Tensor, saved: SavedActivations) -> tuple[Tensor, list[Tensor]]:
    """Gradients with respect to `middle`, and to the adapters of gate, up and down."""
    parts, policy = layer.parts, layer.batch.policy
    size = parts.down.num_in
    wide = _widen(layer, 3, dout_TH.to(policy.dtype))
    dact, dxa = parts.down.input_grad(policy, wide, layer.adapters[3], layer.seeds(3))
    assert dact is not None
    gate_up, saved.gate_up = saved.gate_up, torch.empty(0)
    policy.kernels.swiglu_backward_(
        dact, gate_up[:, : 2 * size]
    )  # `gate_up` now holds its own gradient, `dact` the activation
    scaled = _scaled(layer, 3, saved, dact)
    down_grads = parts.down.weight_grads(policy, wide, dact, scaled, dxa, layer.adapters[3], layer.seeds(3))
    del dact, wide
    normed, rstd = _norm(layer, 2, parts.norm_mid, saved.middle)
    dnormed, dxa = parts.gate_up.input_grad(policy, gate_up, layer.adapters[2], layer.seeds(2))
    source = normed[:, : parts.gate_up.num_in]
    scaled = _scaled(layer, 2, saved, source)
    grads = (
        parts.gate_up.weight_grads(policy, gate_up, source, scaled, dxa, layer.adapters[2], layer.seeds(2)) + down_grads
    )
    del gate_up, normed, source
    args = (dnormed, saved.middle, rstd, parts.norm_mid.weight, dout_TH)
    dmiddle = policy.kernels.rms_norm_backward(*args, spare=layer.ranks(1))
    return dmiddle, grads


def _attention_backward(layer: LayerContext, attention: SavedAttention, dattended: Tensor | None) -> Tensor:
    """Gradient with respect to q, k and v, rotated back and concatenated, with extra columns for the adapters."""
    parts, batch = layer.parts, layer.batch
    dq, dk, dv = torch.autograd.grad(attention.out, attention.heads, dattended)
    width = parts.qkv.num_out
    dqkv = torch.empty(len(dq), width + layer.ranks(0), dtype=batch.policy.dtype, device=dq.device)
    if parts.by_key_head:
        to_q, to_k, to_v = _by_key_head(parts, dqkv[:, :width])
        batch.policy.kernels.rotate(dq.unflatten(1, to_q.shape[1:3]), batch.cos, batch.sin, to_q, inverse=True)
        batch.policy.kernels.rotate(dk, batch.cos, batch.sin, to_k, inverse=True)
        to_v.copy_(dv)
        return dqkv
    to_q, to_k, to_v = _heads(parts, dqkv[:, :width])
    batch.policy.kernels.rotate(dq, batch.cos, batch.sin, to_q, inverse=True)
    batch.policy.kernels.rotate(dk, batch.cos, batch.sin, to_k, inverse=True)
    batch.policy.kernels.copy_rows(dv.reshape(len(dv), -1), dqkv[:, width - to_v[0].numel() : width])
    return dqkv


def _scaled(layer: LayerContext, group: int, saved: SavedActivations, x: Tensor) -> Tensor:
    """`s x A'` of a group: saved, or computed now if the product it belongs to was not recomputed."""
    saved_scaled = saved.scaled[group]
    if saved_scaled is not None:
        return saved_scaled
    return layer.parts.groups[group].scaled_projection(layer.batch.policy, x, layer.adapters[group], layer.seeds(group))


def _rotated(layer: LayerContext, qkv: Tensor) -> Tensor:
    """Rotates queries and keys: in place, or into a tensor of q, k and v if they are grouped by key head."""
    parts, batch = layer.parts, layer.batch
    if not parts.by_key_head:
        both = qkv.unflatten(1, (-1, parts.head_size))[:, : parts.heads + parts.kv_heads]
        batch.policy.kernels.rotate(both, batch.cos, batch.sin, both, inverse=False)
        return qkv
    out = torch.empty_like(qkv)
    grouped, ordered = _by_key_head(parts, qkv), _heads(parts, out)
    to_q = ordered[0].unflatten(1, grouped[0].shape[1:3])
    batch.policy.kernels.rotate(grouped[0], batch.cos, batch.sin, to_q, inverse=False)
    batch.policy.kernels.rotate(grouped[1], batch.cos, batch.sin, ordered[1], inverse=False)
    ordered[2].copy_(grouped[2])
    return out


def _by_key_head(parts: LayerParts, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, (T, K, G, D), and of k and v, (T, K, D), in columns grouped by K key heads with G queries each."""
    grouped = qkv.unflatten(1, (parts.kv_heads, -1, parts.head_size))
    return grouped[:, :, :-2], grouped[:, :, -2], grouped[:, :, -1]


def _heads(parts: LayerParts, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, (T, heads, D)."""
    sizes = (parts.heads, parts.kv_heads, parts.kv_heads)
    q, k, v = qkv.unflatten(1, (-1, parts.head_size)).split(sizes, dim=1)
    return q, k, v


def _norm(layer: LayerContext, group: int, norm: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """The normalized rows with extra columns for a group's adapters, and 1 / rms."""
    policy, size = layer.batch.policy, x_TH.shape[1]
    out = torch.empty(len(x_TH), size + layer.ranks(group), dtype=policy.dtype, device=x_TH.device)
    rstd = policy.kernels.rms_norm(x_TH, norm.weight, norm.variance_epsilon, out[:, :size])
    return out, rstd


def _widen(layer: LayerContext, group: int, x: Tensor) -> Tensor:
    """Adds columns for a group's adapters: without a copy if `rms_norm_backward` has allocated them."""
    ranks = layer.ranks(group)
    if not ranks:
        return x
    wide = x.shape[1] + ranks
    if x.stride() == (wide, 1) and x.untyped_storage().nbytes() == len(x) * wide * x.itemsize:
        return x.as_strided((len(x), wide), (wide, 1))
    out = torch.empty(len(x), x.shape[1] + ranks, dtype=x.dtype, device=x.device)
    layer.batch.policy.kernels.copy_rows(x, out[:, : x.shape[1]])
    return out


def _add(update: Tensor, x: Tensor) -> Tensor:
    """The sum, in place in `update` unless that is a view, about which `fully_shard` would warn."""
    return update.add_(x) if update.dtype == x.dtype and update._base is None else x + update


class LayerFunction(torch.autograd.Function):
    """`apply(x, layer, needs_backward, *adapter parameters)`; autograd needs the parameters as arguments."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, layer: LayerContext, needs_backward: bool, *parameters: Tensor) -> Tensor:
        """See `layer_forward`; `needs_backward`: whether a backward pass follows."""
        recomputed = layer.is_recomputed
        with torch.autocast(x_TH.device.type, enabled=False):
            out, saved = layer_forward(layer, x_TH, differentiable=needs_backward and not recomputed)
        ctx.layer, ctx.x, ctx.saved, ctx.index = layer, x_TH, None if recomputed else saved, None
        offload = layer.batch.offload
        if needs_backward and recomputed and offload is not None:
            ctx.x, ctx.index = None, offload.offload(offload.select(x_TH, saved.middle, saved.gate_up))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Any, ...]:
        """See `layer_backward`; frees the saved activations."""
        layer, x, saved, offload = ctx.layer, ctx.x, ctx.saved, ctx.layer and ctx.layer.batch.offload
        if layer is None:
            raise RuntimeError(
                'the fused path does not support a second backward pass: saved activations have been freed'
            )
        ctx.layer = ctx.x = ctx.saved = None
        with torch.autocast(dout_TH.device.type, enabled=False):
            middle = gate_up = None
            if ctx.index is not None:
                x, middle, gate_up = (*offload.reload(ctx.index), None, None)[:3]
            elif offload is not None:
                offload.prefetch()
            if saved is None:
                saved = recompute_layer(layer, x, middle, gate_up)
            dx, grads = layer_backward(layer, x, dout_TH, saved, need_dx=ctx.needs_input_grad[0])
        return dx, None, None, *grads


class NormFunction(torch.autograd.Function):
    """The last norm; saves only its input."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float, policy: ComputePolicy) -> Tensor:
        """`rms_norm` in the products' dtype."""
        out = torch.empty(x_TH.shape, dtype=policy.dtype, device=x_TH.device)
        rstd = policy.kernels.rms_norm(x_TH, weight_H, eps, out)
        ctx.save_for_backward(x_TH, rstd, weight_H)
        ctx.policy = policy
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Any, ...]:
        """`rms_norm_backward`."""
        x, rstd, weight = ctx.saved_tensors
        return ctx.policy.kernels.rms_norm_backward(dout_TH.contiguous(), x, rstd, weight, None), None, None, None
