"""One decoder layer of a Llama-like model as one autograd function: forward, backward, and what is kept between.

Kept without checkpointing: the layer's input, the rotated q, k and v, the attention's output, the state between the two
halves, gate and up. Norms and the gated activation are computed again in the backward pass: each is one pass over its
rows. With checkpointing only the input is kept; the last product (`down`) is never computed again, nothing needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.fused.context import LayerContext, LayerParts
from xtuner.fused.linear import ComputePolicy


@dataclass
class SavedActivations:
    """What the backward pass needs of one layer's forward pass; of attention, nothing until it is needed."""

    middle: Tensor
    gate_up: Tensor
    scaled: list[Tensor | None]
    attention: Attended | None = None


@dataclass
class Attended:
    """Rotated q, k and v, and what attention made of them, on its own graph."""

    qkv: Tensor
    heads: tuple[Tensor, Tensor, Tensor]
    out: Tensor


def layer_forward(run: LayerContext, x_TH: Tensor, *, differentiable: bool) -> tuple[Tensor, SavedActivations]:
    """Computes a layer.

    Args:
        run: The layer and its batch.
        x_TH: Its input.
        differentiable: Whether attention shall remember what its backward pass needs.

    Returns:
        The output, (T, H), and what the backward pass needs.

    """
    kept = recompute_layer(run, x_TH, None, None, differentiable=differentiable)
    parts, how = run.parts, run.batch.how
    size = parts.down.num_in
    act = torch.empty(len(x_TH), size + run.ranks(3), dtype=how.dtype, device=x_TH.device)
    how.kernels.swiglu(kept.gate_up[:, : 2 * size], act[:, :size])
    update, kept.scaled[3] = parts.down.forward(how, act, run.adapters[3], run.seeds(3))
    return _add(update, kept.middle), kept


def recompute_layer(
    run: LayerContext, x_TH: Tensor, middle: Tensor | None, gate_up: Tensor | None, *, differentiable: bool = True
) -> SavedActivations:
    """All of a layer but its last product, less what is there already: the state between the halves, gate and up.

    Where the state between the halves is there, attention waits until the backward pass is done with the other half.
    """
    parts, how = run.parts, run.batch.how
    scaled: list[Tensor | None] = [None] * 4
    attention = None
    if middle is None:
        attention = _attend(run, x_TH, scaled, differentiable=differentiable)
        wide = _widen(run, 1, attention.out.detach())
        update, scaled[1] = parts.out.forward(how, wide, run.adapters[1], run.seeds(1))
        del wide
        middle = _add(update, x_TH)
    if gate_up is None:
        normed, _ = _norm(run, 2, parts.norm_mid, middle)
        spare = run.ranks(2)
        gate_up, scaled[2] = parts.gate_up.forward(how, normed, run.adapters[2], run.seeds(2), spare=spare)
    return SavedActivations(middle, gate_up, scaled, attention)


def _attend(run: LayerContext, x_TH: Tensor, scaled: list[Tensor | None], *, differentiable: bool = True) -> Attended:
    parts, how = run.parts, run.batch.how
    normed, _ = _norm(run, 0, parts.norm_in, x_TH)
    qkv, scaled[0] = parts.qkv.forward(how, normed, run.adapters[0], run.seeds(0))
    del normed
    qkv = _rotated(run, qkv)
    q, k, v = (t.detach().requires_grad_(differentiable) for t in _heads(parts, qkv))
    with torch.set_grad_enabled(differentiable):
        out = run.batch.attention.forward(q, k, v, parts.scale)
    return Attended(qkv, (q, k, v), out)


def layer_backward(
    run: LayerContext, x_TH: Tensor, dout_TH: Tensor, kept: SavedActivations, *, need_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients by a layer's input and by its adapters, A and B in the order of the groups.

    Overwrites what was kept.
    """
    dmiddle, mlp_grads = _mlp_backward(run, dout_TH, kept)
    parts, how = run.parts, run.batch.how
    kept.middle = torch.empty(0)
    attention = kept.attention or _attend(run, x_TH, kept.scaled)
    wide = _widen(run, 1, dmiddle.to(how.dtype))
    dattended, dxa = parts.out.input_grad(how, wide, run.adapters[1], run.seeds(1))
    attended = attention.out.detach()
    scaled = _scaled(run, 1, kept, attended)
    out_grads = parts.out.weight_grads(how, wide, attended, scaled, dxa, run.adapters[1], run.seeds(1))
    del wide, attended
    dqkv = _attention_backward(run, attention, dattended)
    del dattended
    normed, rstd = _norm(run, 0, parts.norm_in, x_TH)
    dnormed, dxa = parts.qkv.input_grad(how, dqkv, run.adapters[0], run.seeds(0), need_dx=need_dx)
    source = normed[:, : parts.qkv.num_in]
    scaled = _scaled(run, 0, kept, source)
    qkv_grads = parts.qkv.weight_grads(how, dqkv, source, scaled, dxa, run.adapters[0], run.seeds(0))
    dx = None
    if dnormed is not None:
        spare = run.ranks(3)  # where the layer before, whose gradient this is, appends its own
        dx = how.kernels.rms_norm_backward(dnormed, x_TH, rstd, parts.norm_in.weight, dmiddle, spare=spare)
    return dx, qkv_grads + out_grads + mlp_grads


def _mlp_backward(run: LayerContext, dout_TH: Tensor, kept: SavedActivations) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradient by the state between the halves, and by the adapters of gate, up and down."""
    parts, how = run.parts, run.batch.how
    size = parts.down.num_in
    wide = _widen(run, 3, dout_TH.to(how.dtype))
    dact, dxa = parts.down.input_grad(how, wide, run.adapters[3], run.seeds(3))
    assert dact is not None
    gate_up, kept.gate_up = kept.gate_up, torch.empty(0)
    how.kernels.swiglu_backward_(dact, gate_up[:, : 2 * size])  # gate_up is its gradient now, dact the activation
    scaled = _scaled(run, 3, kept, dact)
    down_grads = parts.down.weight_grads(how, wide, dact, scaled, dxa, run.adapters[3], run.seeds(3))
    del dact, wide
    normed, rstd = _norm(run, 2, parts.norm_mid, kept.middle)
    dnormed, dxa = parts.gate_up.input_grad(how, gate_up, run.adapters[2], run.seeds(2))
    source = normed[:, : parts.gate_up.num_in]
    scaled = _scaled(run, 2, kept, source)
    grads = parts.gate_up.weight_grads(how, gate_up, source, scaled, dxa, run.adapters[2], run.seeds(2)) + down_grads
    del gate_up, normed, source
    args = (dnormed, kept.middle, rstd, parts.norm_mid.weight, dout_TH)
    dmiddle = how.kernels.rms_norm_backward(*args, spare=run.ranks(1))
    return dmiddle, grads


def _attention_backward(run: LayerContext, attention: Attended, dattended: Tensor | None) -> Tensor:
    """The gradient by q, k and v side by side, rotated back, with room for the adapters' ranks."""
    parts, batch = run.parts, run.batch
    dq, dk, dv = torch.autograd.grad(attention.out, attention.heads, dattended)
    width = parts.qkv.num_out
    dqkv = torch.empty(len(dq), width + run.ranks(0), dtype=batch.how.dtype, device=dq.device)
    if parts.by_key_head:
        to_q, to_k, to_v = _by_key_head(parts, dqkv[:, :width])
        batch.how.kernels.rotate(dq.unflatten(1, to_q.shape[1:3]), batch.cos, batch.sin, to_q, inverse=True)
        batch.how.kernels.rotate(dk, batch.cos, batch.sin, to_k, inverse=True)
        to_v.copy_(dv)
        return dqkv
    to_q, to_k, to_v = _heads(parts, dqkv[:, :width])
    batch.how.kernels.rotate(dq, batch.cos, batch.sin, to_q, inverse=True)
    batch.how.kernels.rotate(dk, batch.cos, batch.sin, to_k, inverse=True)
    batch.how.kernels.copy_rows(dv.reshape(len(dv), -1), dqkv[:, width - to_v[0].numel() : width])
    return dqkv


def _scaled(run: LayerContext, group: int, kept: SavedActivations, x: Tensor) -> Tensor:
    """`s x A'` of a group: kept, or computed now where the product it belongs to was not computed again."""
    known = kept.scaled[group]
    if known is not None:
        return known
    return run.parts.groups[group].scaled_projection(run.batch.how, x, run.adapters[group], run.seeds(group))


def _rotated(run: LayerContext, qkv: Tensor) -> Tensor:
    """Queries, keys and values side by side, the first two rotated: in place, or moved from groups by key head."""
    parts, batch = run.parts, run.batch
    if not parts.by_key_head:
        both = qkv.unflatten(1, (-1, parts.head_size))[:, : parts.heads + parts.kv_heads]
        batch.how.kernels.rotate(both, batch.cos, batch.sin, both, inverse=False)
        return qkv
    out = torch.empty_like(qkv)
    grouped, ordered = _by_key_head(parts, qkv), _heads(parts, out)
    to_q = ordered[0].unflatten(1, grouped[0].shape[1:3])
    batch.how.kernels.rotate(grouped[0], batch.cos, batch.sin, to_q, inverse=False)
    batch.how.kernels.rotate(grouped[1], batch.cos, batch.sin, ordered[1], inverse=False)
    ordered[2].copy_(grouped[2])
    return out


def _by_key_head(parts: LayerParts, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q as (T, K, G, D), of k and v as (T, K, D), of columns grouped by K key heads with G queries each."""
    grouped = qkv.unflatten(1, (parts.kv_heads, -1, parts.head_size))
    return grouped[:, :, :-2], grouped[:, :, -2], grouped[:, :, -1]


def _heads(parts: LayerParts, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v as (T, heads, D)."""
    sizes = (parts.heads, parts.kv_heads, parts.kv_heads)
    q, k, v = qkv.unflatten(1, (-1, parts.head_size)).split(sizes, dim=1)
    return q, k, v


def _norm(run: LayerContext, group: int, norm: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor]:
    """The normed rows with room for a group's ranks, and 1 / rms."""
    how, size = run.batch.how, x_TH.shape[1]
    out = torch.empty(len(x_TH), size + run.ranks(group), dtype=how.dtype, device=x_TH.device)
    rstd = how.kernels.rms_norm(x_TH, norm.weight, norm.variance_epsilon, out[:, :size])
    return out, rstd


def _widen(run: LayerContext, group: int, x: Tensor) -> Tensor:
    """The tensor with room for a group's ranks: itself where `rms_norm_backward` left some, else a copy."""
    ranks = run.ranks(group)
    if not ranks:
        return x
    wide = x.shape[1] + ranks
    if x.stride() == (wide, 1) and x.untyped_storage().nbytes() == len(x) * wide * x.itemsize:
        return x.as_strided((len(x), wide), (wide, 1))
    out = torch.empty(len(x), x.shape[1] + ranks, dtype=x.dtype, device=x.device)
    run.batch.how.kernels.copy_rows(x, out[:, : x.shape[1]])
    return out


def _add(update: Tensor, x: Tensor) -> Tensor:
    """The sum, in `update`'s place unless that is a view, of which `fully_shard` would warn."""
    return update.add_(x) if update.dtype == x.dtype and update._base is None else x + update


class LayerFunction(torch.autograd.Function):
    """`apply(x, run, keep, *adapter parameters)`, parameters as arguments so that autograd serves their gradients."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, run: LayerContext, keep: bool, *parameters: Tensor) -> Tensor:
        """See `layer_forward`; `keep` says whether a backward pass will follow."""
        again = run.again
        with torch.autocast(x_TH.device.type, enabled=False):
            out, kept = layer_forward(run, x_TH, differentiable=keep and not again)
        ctx.run, ctx.x, ctx.kept, ctx.place = run, x_TH, None if again else kept, None
        store = run.batch.store
        if keep and again and store is not None:
            ctx.x, ctx.place = None, store.offload(store.select(x_TH, kept.middle, kept.gate_up))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Any, ...]:
        """See `layer_backward`; everything kept is let go."""
        run, x, kept, store = ctx.run, ctx.x, ctx.kept, ctx.run and ctx.run.batch.store
        if run is None:
            raise RuntimeError('the fast path keeps no graph for a second backward pass')
        ctx.run = ctx.x = ctx.kept = None
        with torch.autocast(dout_TH.device.type, enabled=False):
            middle = gate_up = None
            if ctx.place is not None:
                x, middle, gate_up = (*store.reload(ctx.place), None, None)[:3]
            elif store is not None:
                store.prefetch()
            if kept is None:
                kept = recompute_layer(run, x, middle, gate_up)
            dx, grads = layer_backward(run, x, dout_TH, kept, need_dx=ctx.needs_input_grad[0])
        return dx, None, None, *grads


class NormFunction(torch.autograd.Function):
    """The last norm, keeping only its input."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, weight_H: Tensor, eps: float, how: ComputePolicy) -> Tensor:
        """`rms_norm` in the products' dtype."""
        out = torch.empty(x_TH.shape, dtype=how.dtype, device=x_TH.device)
        rstd = how.kernels.rms_norm(x_TH, weight_H, eps, out)
        ctx.save_for_backward(x_TH, rstd, weight_H)
        ctx.how = how
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Any, ...]:
        """`rms_norm_backward`."""
        x, rstd, weight = ctx.saved_tensors
        return ctx.how.kernels.rms_norm_backward(dout_TH.contiguous(), x, rstd, weight, None), None, None, None
