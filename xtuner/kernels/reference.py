"""Every kernel in plain PyTorch: what runs on a CPU, and what the fused kernels are compared with.

The functions have the same names, arguments and results as those in `fused`; outputs may be strided views (rows of a
wider buffer), which is how a producer writes straight to where the next product reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.kernels.cpu_gemm import product, sum_of_products
from xtuner.kernels.last_used import LastUsed
from xtuner.kernels.quantized import QuantizedWeight

FP8_MAX = 448.0  # the largest number of float8_e4m3fn
FP8_TINY = 2.0**-100  # scale of a row of zeros
_MASK32 = 0xFFFFFFFF
_MASKS = LastUsed(2**27)  # of dropout on a CPU, from a forward pass to its backward pass


def dequantize_into(out_NK: Tensor, weight: QuantizedWeight, scale: Tensor | None = None) -> None:
    """Writes a 4-bit weight's values, rounded to `out`'s dtype.

    Args:
        out_NK: Float matrix, rows may be further apart than K.
        weight: The quantised weight, N by K.
        scale: float32 (): what to divide the values by; None: nothing.

    """
    packed = weight.packed.reshape(-1)
    indices = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1).long()
    values = weight.table[indices[: out_NK.numel()]]
    scales = weight.scales().repeat_interleave(weight.block)[: out_NK.numel()]
    values = (values * scales).view(out_NK.shape)
    out_NK.copy_(values if scale is None else values / scale)


def dequantize_transposed_into(out_KN: Tensor, weight: QuantizedWeight, scale: Tensor) -> None:
    """Writes a 4-bit weight's values over `scale`, transposed: `dequantize_into` with rows for columns."""
    values = torch.empty(weight.shape, device=out_KN.device)
    dequantize_into(values, weight, scale)
    out_KN.copy_(values.t())


def quantize_rows(x_TK: Tensor, tail_TR: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rounds `[x | tail]` to FP8 (e4m3), each row scaled so that its largest entry is the largest FP8 number.

    Args:
        x_TK: Any float dtype; rows may be further apart than K.
        tail_TR: More columns, or None.

    Returns:
        float8_e4m3fn (T, K + R), and float32 (T, 1): each row's scale, by which to multiply to come back.

    """
    x = _wide(x_TK if tail_TR is None else torch.cat((x_TK, tail_TR), dim=1))
    scale = (x.abs().amax(1, keepdim=True) / FP8_MAX).clamp_min(FP8_TINY)
    return (x / scale).to(torch.float8_e4m3fn), scale.float()


def fp8_product(
    x_TK: Tensor, scale_T1: Tensor, weight_NK: Tensor, scale: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(x * scale_T1) @ (weight * scale).T + bias` of FP8 matrices, (T, N) in `dtype`, summed in float32.

    Args:
        x_TK: float8_e4m3fn; K a multiple of 16.
        scale_T1: float32: a scale a row.
        weight_NK: float8_e4m3fn; N a multiple of 16.
        scale: float32 (): one scale for all of the weight, which FP8's own exponent makes enough.
        bias_N: In `dtype`, or None.
        dtype: Of the result.

    """
    out = (x_TK.float() @ weight_NK.float().t()) * (scale_T1 * scale)
    return (out if bias_N is None else out + bias_N).to(dtype)


def copy_rows(x_TK: Tensor, out_TK: Tensor) -> None:
    """Writes rows to where they may be further apart."""
    out_TK.copy_(x_TK)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, out_TH: Tensor) -> Tensor:
    """Writes `x / rms(x) * weight`, computed in float32 (float64 for a float64 input).

    Returns:
        1 / rms(x), (T,).

    """
    x = _wide(x_TH)
    rstd = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    _multiply_into(out_TH, x * rstd[:, None], weight_H)
    return rstd


def rms_norm_backward(
    dh_TH: Tensor, x_TH: Tensor, rstd_T: Tensor, weight_H: Tensor, residual_TH: Tensor | None, *, spare: int = 0
) -> Tensor:
    """The gradient by `x` of `rms_norm`, plus the gradient that went around it.

    Args:
        dh_TH: Gradient by the norm's output.
        x_TH: The norm's input.
        rstd_T: What `rms_norm` returned.
        weight_H: The norm's weight.
        residual_TH: Gradient to add, or None.
        spare: Columns of room to leave behind each row, for what multiplies the result next.

    Returns:
        (T, H) in the dtype of `x`.

    """
    x, rstd = _wide(x_TH), rstd_T[:, None]
    dx = _wide(dh_TH) * weight_H
    along = (dx * x).mean(-1, keepdim=True) * rstd**3
    dx.mul_(rstd).addcmul_(x, along, value=-1)
    if residual_TH is not None:
        dx.add_(residual_TH)
    return dx if dx.dtype == x_TH.dtype and not spare else roomy(x_TH, spare).copy_(dx)


def roomy(like_TK: Tensor, spare: int) -> Tensor:
    """An empty matrix like another, each row followed by room for more columns."""
    rows, size = like_TK.shape
    return torch.empty(rows, size + spare, dtype=like_TK.dtype, device=like_TK.device)[:, :size]


def rotate(x_TAD: Tensor, cos_TD: Tensor, sin_TD: Tensor, out_TAD: Tensor, *, inverse: bool) -> None:
    """Writes heads rotated by their token's angles (rotary embedding), or rotated back.

    Args:
        x_TAD: T tokens, A heads of size D, or (T, K, G, D): heads in K groups of G; any strides but the last.
        cos_TD: (T, D / 2) cosines.
        sin_TD: (T, D / 2) sines.
        out_TAD: Where to write, of the same shape; may be `x` itself.
        inverse: Rotate back, which is also how a gradient passes.

    """
    half = x_TAD.shape[-1] // 2
    shape = (len(cos_TD), *[1] * (x_TAD.dim() - 2), half)
    cos, sin = cos_TD.reshape(shape), (-sin_TD if inverse else sin_TD).reshape(shape)
    first, second = _wide(x_TAD[..., :half]), _wide(x_TAD[..., half:])
    turned = (second * cos).addcmul_(first, sin)  # both before anything is overwritten
    out_TAD[..., :half].copy_((first * cos).addcmul_(second, sin, value=-1))
    out_TAD[..., half:].copy_(turned)


def swiglu(gate_up: Tensor, out_TI: Tensor) -> None:
    """Writes `silu(gate) * up` of a (T, 2 I) matrix that holds both."""
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    _multiply_into(out_TI, functional.silu(gate), up)


def swiglu_backward_(dact_TI: Tensor, gate_up: Tensor) -> None:
    """Turns `gate_up` into its gradient and `dact` into the activation `swiglu` had produced, both in place.

    Args:
        dact_TI: Gradient by the activation; afterwards the activation.
        gate_up: (T, 2 I); afterwards its gradient.

    """
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    silu, dact = functional.silu(gate), _wide(dact_TI)
    dgate = torch.ops.aten.silu_backward(dact * up, gate)
    dup, act = dact * silu, silu.mul_(up)  # both before anything is overwritten
    for part, out in zip((dgate, dup), gate_up.chunk(2, dim=-1), strict=True):
        out.copy_(part)
    dact_TI.copy_(act)


def dropout_keep(num_rows: int, num_columns: int, p: float, seed: Tensor) -> Tensor:
    """Which entries of a (T, K) matrix dropout keeps: a hash of the entry's index and the seed, no state.

    Args:
        num_rows: T.
        num_columns: K.
        p: Share to drop, 0 to 1; met to within 2**-32.
        seed: int64 (), 0 to 2**31 - 1, where the mask shall be: in a tensor, so that recorded graphs read the step's.

    Returns:
        bool (T, K).

    """
    numbers = torch.arange(num_rows * num_columns, dtype=torch.int32, device=seed.device)
    hashed = _hash_(numbers, seed).bitwise_xor_(-(2**31))  # unsigned order in signed numbers
    return (hashed >= drop_threshold(p) - 2**31).view(num_rows, num_columns)


def drop_threshold(p: float) -> int:
    """The hash value under which an entry is dropped."""
    return min(int(p * 2**32), _MASK32)


def _hash_(x: Tensor, seed: Tensor) -> Tensor:
    """Two rounds of multiply and shift over 32 bits, the seed entering both; in place, `x` int32."""
    second, shifted = (seed * 0x9E3779B1) ^ (seed >> 15), torch.empty_like(x)

    def fold(bits: int) -> Tensor:
        """Mixes the upper bits into the lower ones."""
        torch.bitwise_right_shift(x, bits, out=shifted)
        return x.bitwise_xor_(shifted.bitwise_and_(_MASK32 >> bits))  # int32 shifts its sign in

    x.bitwise_xor_(seed.to(torch.int32))
    fold(16).mul_(0x7FEB352D).add_(second.to(torch.int32))
    fold(15).mul_(0x846CA68B - 2**32)
    return fold(16)


def dropout_project(x_TK: Tensor, a_rK: Tensor, p: float, seed: Tensor, out_Tr: Tensor) -> None:
    """Writes `dropout(x) @ A.T`, the mask drawn from `seed`."""
    out_Tr.copy_(_wide(product(_dropped(x_TK, p, seed), a_rK.t())) / (1 - p))


def dropout_project_weight_grad(dxa_Tr: Tensor, x_TK: Tensor, p: float, seed: Tensor) -> Tensor:
    """The gradient by A of `dropout(x) @ A.T`, the same mask drawn again: (r, K), float32 or wider."""
    return _wide(sum_of_products(dxa_Tr, _dropped(x_TK, p, seed))) / (1 - p)


def dropout_project_input_grad_(dx_TK: Tensor, dxa_Tr: Tensor, a_rK: Tensor, p: float, seed: Tensor) -> None:
    """Adds the gradient by x of `dropout(x) @ A.T` to `dx`, the same mask drawn again."""
    extra = _wide(product(dxa_Tr, a_rK)).mul_(_keep_like(dx_TK, p, seed))
    dx_TK.copy_(torch.add(dx_TK, extra, alpha=1 / (1 - p)))


def _dropped(x_TK: Tensor, p: float, seed: Tensor) -> Tensor:
    return x_TK * _keep_like(x_TK, p, seed)


def _keep_like(x_TK: Tensor, p: float, seed: Tensor) -> Tensor:
    """`dropout_keep` in the dtype of `x`: products of unlike dtypes are many times slower.

    A CPU remembers the last masks: drawing one takes as long as what it is drawn for.
    """

    def draw() -> Tensor:
        """A fresh mask."""
        return dropout_keep(x_TK.shape[0], x_TK.shape[1], p, seed).to(x_TK.dtype)

    return draw() if seed.device.type != 'cpu' else _MASKS.get((*x_TK.shape, p, int(seed), x_TK.dtype), draw)


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
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _multiply_into(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """Writes a product that is computed as wide as `x` is; without a copy where that is as wide as `out`."""
    if out.dtype == x.dtype:
        torch.mul(x, factor, out=out)
    else:
        out.copy_(x * factor)
