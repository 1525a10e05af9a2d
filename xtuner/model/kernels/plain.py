"""Every kernel in plain PyTorch: what runs on a CPU, and what the fused kernels are compared with.

The functions have the same names, arguments and results as those in `fused`; outputs may be strided views (rows of a
wider buffer), which is how a producer writes straight to where the next product reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.model.kernels.quantized import QuantizedWeight

_MASK32 = 0xFFFFFFFF


def dequantize_into(out_NK: Tensor, weight: QuantizedWeight) -> None:
    """Writes a 4-bit weight's values, rounded to `out`'s dtype.

    Args:
        out_NK: Float matrix, rows may be further apart than K.
        weight: The quantised weight, N by K.

    """
    packed = weight.packed.reshape(-1)
    indices = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1).long()
    values = weight.table[indices[: out_NK.numel()]]
    scales = weight.scales().repeat_interleave(weight.block)[: out_NK.numel()]
    out_NK.copy_((values * scales).view(out_NK.shape))


def copy_rows(x_TK: Tensor, out_TK: Tensor) -> None:
    """Writes rows to where they may be further apart."""
    out_TK.copy_(x_TK)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, out_TH: Tensor) -> Tensor:
    """Writes `x / rms(x) * weight`, computed in float32 (float64 for a float64 input).

    Returns:
        1 / rms(x), (T,).

    """
    x = _wide(x_TH)
    rstd = torch.rsqrt(x.square().mean(-1) + eps)
    out_TH.copy_(x * rstd[:, None] * weight_H)
    return rstd


def rms_norm_backward(
    dh_TH: Tensor, x_TH: Tensor, rstd_T: Tensor, weight_H: Tensor, residual_TH: Tensor | None
) -> Tensor:
    """The gradient by `x` of `rms_norm`, plus the gradient that went around it.

    Args:
        dh_TH: Gradient by the norm's output.
        x_TH: The norm's input.
        rstd_T: What `rms_norm` returned.
        weight_H: The norm's weight.
        residual_TH: Gradient to add, or None.

    Returns:
        (T, H) in the dtype of `x`.

    """
    normed = _wide(x_TH) * rstd_T[:, None]
    scaled = _wide(dh_TH) * weight_H
    dx = rstd_T[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    if residual_TH is not None:
        dx = dx + residual_TH
    return dx.to(x_TH.dtype)


def rotate(x_TAD: Tensor, cos_TD: Tensor, sin_TD: Tensor, out_TAD: Tensor, *, inverse: bool) -> None:
    """Writes heads rotated by their token's angles (rotary embedding), or rotated back.

    Args:
        x_TAD: T tokens, A heads of size D; any strides between tokens and heads.
        cos_TD: (T, D / 2) cosines.
        sin_TD: (T, D / 2) sines.
        out_TAD: Where to write; may be `x` itself.
        inverse: Rotate back, which is also how a gradient passes.

    """
    half = x_TAD.shape[-1] // 2
    cos, sin = cos_TD[:, None], -sin_TD[:, None] if inverse else sin_TD[:, None]
    first, second = _wide(x_TAD[..., :half]), _wide(x_TAD[..., half:])
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    out_TAD.copy_(rotated)


def swiglu(gate_up: Tensor, out_TI: Tensor) -> None:
    """Writes `silu(gate) * up` of a (T, 2 I) matrix that holds both."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    out_TI.copy_(functional.silu(gate) * up)


def swiglu_backward_(dact_TI: Tensor, gate_up: Tensor) -> None:
    """Turns `gate_up` into its gradient and `dact` into the activation `swiglu` had produced, both in place.

    Args:
        dact_TI: Gradient by the activation; afterwards the activation.
        gate_up: (T, 2 I); afterwards its gradient.

    """
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    sigmoid, dact = torch.sigmoid(gate), _wide(dact_TI)
    silu = gate * sigmoid
    dgate = dact * up * (sigmoid + silu * (1 - sigmoid))
    dup, act = dact * silu, silu * up  # both before anything is overwritten
    gate_up.copy_(torch.cat((dgate, dup), dim=-1))
    dact_TI.copy_(act)


def dropout_keep(num_rows: int, num_columns: int, p: float, seed: int, device: torch.device) -> Tensor:
    """Which entries of a (T, K) matrix dropout keeps: a hash of the entry's index and the seed, no state.

    Args:
        num_rows: T.
        num_columns: K.
        p: Share to drop, 0 to 1; met to within 2**-32.
        seed: 0 to 2**31 - 1.
        device: Where the mask shall be.

    Returns:
        bool (T, K).

    """
    index = torch.arange(num_rows * num_columns, device=device) & _MASK32
    return (_hash(index, seed) >= drop_threshold(p)).view(num_rows, num_columns)


def drop_threshold(p: float) -> int:
    """The hash value under which an entry is dropped."""
    return min(int(p * 2**32), _MASK32)


def _hash(index: Tensor, seed: int) -> Tensor:
    """Two rounds of multiply and shift over 32 bits, the seed entering both."""
    second = ((seed * 0x9E3779B1) ^ (seed >> 15)) & _MASK32
    x = index ^ seed
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = (x + second) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def dropout_project(x_TK: Tensor, a_rK: Tensor, p: float, seed: int, out_Tr: Tensor) -> None:
    """Writes `dropout(x) @ A.T`, the mask drawn from `seed`."""
    out_Tr.copy_(_wide(_dropped(x_TK, p, seed) @ a_rK.t()) / (1 - p))


def dropout_project_weight_grad(dxa_Tr: Tensor, x_TK: Tensor, p: float, seed: int) -> Tensor:
    """The gradient by A of `dropout(x) @ A.T`, the same mask drawn again: (r, K), float32 or wider."""
    return _wide(dxa_Tr.t() @ _dropped(x_TK, p, seed)) / (1 - p)


def dropout_project_input_grad_(dx_TK: Tensor, dxa_Tr: Tensor, a_rK: Tensor, p: float, seed: int) -> None:
    """Adds the gradient by x of `dropout(x) @ A.T` to `dx`, the same mask drawn again."""
    keep = dropout_keep(dx_TK.shape[0], dx_TK.shape[1], p, seed, dx_TK.device)
    dx_TK.copy_(dx_TK + _wide(dxa_Tr @ a_rK).mul_(keep) / (1 - p))


def _dropped(x_TK: Tensor, p: float, seed: int) -> Tensor:
    keep = dropout_keep(x_TK.shape[0], x_TK.shape[1], p, seed, x_TK.device)
    return x_TK * keep


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Turns logits into the gradient of the summed cross entropy, in place.

    Args:
        logits_TV: Any float dtype; afterwards `softmax(logits) - onehot(targets)`.
        targets_T: int64, all valid.

    Returns:
        float32 (T,): each row's loss.

    """
    logits = _wide(logits_TV)  # the logits themselves where they are wide: each pass below is in place
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    rows = torch.arange(len(targets_T), device=targets_T.device)
    chosen = logits[rows, targets_T]
    mass = logits.exp_().sum(dim=-1)
    loss = mass.log() - chosen
    logits.div_(mass[:, None])
    logits[rows, targets_T] -= 1
    if logits is not logits_TV:
        logits_TV.copy_(logits)
    return loss


def _wide(x: Tensor) -> Tensor:
    """Float32, or float64 where it already is."""
    return x if x.dtype == torch.float64 else x.float()
