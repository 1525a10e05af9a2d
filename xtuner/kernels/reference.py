"""Reference kernels in plain PyTorch: used on a CPU and as the baseline for the Triton kernels.

The functions have the same names, arguments and results as those in `triton/`; outputs may be strided views (rows of a
wider buffer), so that a producer writes directly to where the next product reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xtuner.kernels.cpu_gemm import product, sum_of_products
from xtuner.kernels.last_used import LRUTensors
from xtuner.kernels.quantized import QuantizedWeight

FP8_MAX = 448.0  # the largest float8_e4m3fn value
FP8_TINY = 2.0**-100  # the scale of a zero row
_MASK32 = 0xFFFFFFFF
_MASKS = LRUTensors(2**27)  # dropout masks on a CPU, kept from the forward pass to the backward pass


def dequantize_into(out_NK: Tensor, weight: QuantizedWeight, scale: Tensor | None = None) -> None:
    """Dequantizes a 4-bit weight into `out`, rounded to its dtype.

    Args:
        out_NK: Float matrix; its row stride may exceed K.
        weight: The quantized weight, N by K.
        scale: float32 (), a divisor of the values; None: no division.

    """
    packed = weight.packed.reshape(-1)
    indices = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1).long()
    values = weight.table[indices[: out_NK.numel()]]
    scales = weight.scales().repeat_interleave(weight.block)[: out_NK.numel()]
    values = (values * scales).view(out_NK.shape)
    out_NK.copy_(values if scale is None else values / scale)


def dequantize_transposed_into(out_KN: Tensor, weight: QuantizedWeight, scale: Tensor) -> None:
    """Dequantizes a 4-bit weight divided by `scale`, transposed: `dequantize_into` with rows and columns swapped."""
    values = torch.empty(weight.shape, device=out_KN.device)
    dequantize_into(values, weight, scale)
    out_KN.copy_(values.t())


def quantize_rows(x_TK: Tensor, tail_TR: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantizes `[x | tail]` to FP8 (e4m3) with one scale per row, so that a row's largest entry becomes FP8_MAX.

    Args:
        x_TK: Any float dtype; its row stride may exceed K.
        tail_TR: Additional columns, or None.

    Returns:
        float8_e4m3fn (T, K + R), and the row scales, float32 (T, 1), by which to multiply to dequantize.

    """
    x = wide(x_TK if tail_TR is None else torch.cat((x_TK, tail_TR), dim=1))
    scale = (x.abs().amax(1, keepdim=True) / FP8_MAX).clamp_min(FP8_TINY)
    return (x / scale).to(torch.float8_e4m3fn), scale.float()


def fp8_product(
    x_TK: Tensor, scale_T1: Tensor, weight_NK: Tensor, scale: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`(x * scale_T1) @ (weight * scale).T + bias` of FP8 matrices, (T, N) in `dtype`, accumulated in float32.

    Args:
        x_TK: float8_e4m3fn; K a multiple of 16.
        scale_T1: float32, one scale per row.
        weight_NK: float8_e4m3fn; N a multiple of 16.
        scale: float32 (), one scale for the whole weight, which suffices because of FP8's exponent.
        bias_N: In `dtype`, or None.
        dtype: Dtype of the result.

    """
    out = (x_TK.float() @ weight_NK.float().t()) * (scale_T1 * scale)
    return (out if bias_N is None else out + bias_N).to(dtype)


def copy_rows(x_TK: Tensor, out_TK: Tensor) -> None:
    """Copies rows to an output with another row stride."""
    out_TK.copy_(x_TK)


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float, out_TH: Tensor) -> Tensor:
    """Writes `x / rms(x) * weight`, computed in float32 (float64 for float64 input).

    Returns:
        1 / rms(x), (T,).

    """
    x = wide(x_TH)
    rstd = torch.linalg.vector_norm(x, dim=-1).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    _multiply_into(out_TH, x * rstd[:, None], weight_H)
    return rstd


def rms_norm_backward(
    dh_TH: Tensor, x_TH: Tensor, rstd_T: Tensor, weight_H: Tensor, residual_TH: Tensor | None, *, spare: int = 0
) -> Tensor:
    """Gradient of `rms_norm` with respect to `x`, plus the gradient of the residual connection.

    Args:
        dh_TH: Gradient with respect to the norm's output.
        x_TH: The norm's input.
        rstd_T: The result of `rms_norm`.
        weight_H: The norm's weight.
        residual_TH: Gradient to add, or None.
        spare: Columns to reserve after each row for the next product.

    Returns:
        (T, H) in the dtype of `x`.

    """
    x, rstd = wide(x_TH), rstd_T[:, None]
    dx = wide(dh_TH) * weight_H
    projection = (dx * x).mean(-1, keepdim=True) * rstd**3
    dx.mul_(rstd).addcmul_(x, projection, value=-1)
    if residual_TH is not None:
        dx.add_(residual_TH)
    return dx if dx.dtype == x_TH.dtype and not spare else empty_with_spare(x_TH, spare).copy_(dx)


def empty_with_spare(like_TK: Tensor, spare: int) -> Tensor:
    """Returns an empty matrix shaped like another, with spare columns after each row."""
    rows, size = like_TK.shape
    return torch.empty(rows, size + spare, dtype=like_TK.dtype, device=like_TK.device)[:, :size]


def rotate(x_TAD: Tensor, cos_TD: Tensor, sin_TD: Tensor, out_TAD: Tensor, *, inverse: bool) -> None:
    """Applies rotary position embedding (RoPE), or its inverse.

    Args:
        x_TAD: T tokens, A heads of size D, or (T, K, G, D): heads in K groups of G; any strides but the last.
        cos_TD: (T, D / 2) cosines.
        sin_TD: (T, D / 2) sines.
        out_TAD: Output of the same shape; may be `x` itself.
        inverse: Rotate by the negative angle, as the backward pass does.

    """
    half = x_TAD.shape[-1] // 2
    shape = (len(cos_TD), *[1] * (x_TAD.dim() - 2), half)
    cos, sin = cos_TD.reshape(shape), (-sin_TD if inverse else sin_TD).reshape(shape)
    x1, x2 = wide(x_TAD[..., :half]), wide(x_TAD[..., half:])
    rotated = (x2 * cos).addcmul_(x1, sin)  # computed before any input is overwritten
    out_TAD[..., :half].copy_((x1 * cos).addcmul_(x2, sin, value=-1))
    out_TAD[..., half:].copy_(rotated)


def swiglu(gate_up: Tensor, out_TI: Tensor) -> None:
    """Writes `silu(gate) * up` for a (T, 2 I) matrix that contains both."""
    gate, up = wide(gate_up).chunk(2, dim=-1)
    _multiply_into(out_TI, functional.silu(gate), up)


def swiglu_backward_(dact_TI: Tensor, gate_up: Tensor) -> None:
    """Replaces `gate_up` by its gradient and `dact` by the activation that `swiglu` computed, both in place.

    Args:
        dact_TI: Gradient with respect to the activation; afterwards the activation.
        gate_up: (T, 2 I); afterwards its gradient.

    """
    gate, up = wide(gate_up).chunk(2, dim=-1)
    silu, dact = functional.silu(gate), wide(dact_TI)
    dgate = torch.ops.aten.silu_backward(dact * up, gate)
    dup, act = dact * silu, silu.mul_(up)  # computed before any input is overwritten
    for part, out in zip((dgate, dup), gate_up.chunk(2, dim=-1), strict=True):
        out.copy_(part)
    dact_TI.copy_(act)


def dropout_keep(num_rows: int, num_columns: int, p: float, seed: Tensor) -> Tensor:
    """Dropout mask of a (T, K) matrix: a stateless hash of each entry's index and the seed; True is kept.

    Args:
        num_rows: T.
        num_columns: K.
        p: Drop probability, 0 to 1, exact to 2**-32.
        seed: int64 (), 0 to 2**31 - 1, on the mask's device: a tensor, so that CUDA graphs read the current step's
            seed.

    Returns:
        bool (T, K).

    """
    numbers = torch.arange(num_rows * num_columns, dtype=torch.int32, device=seed.device)
    hashed = _hash_(numbers, seed).bitwise_xor_(-(2**31))  # maps unsigned order to signed order
    return (hashed >= drop_threshold(p) - 2**31).view(num_rows, num_columns)


def drop_threshold(p: float) -> int:
    """The hash value below which an entry is dropped."""
    return min(int(p * 2**32), _MASK32)


def _hash_(x: Tensor, seed: Tensor) -> Tensor:
    """Two rounds of multiply-and-shift hashing over 32 bits with the seed in both; in place, `x` int32."""
    seed2, shifted = (seed * 0x9E3779B1) ^ (seed >> 15), torch.empty_like(x)

    def fold(bits: int) -> Tensor:
        """Mixes the upper bits into the lower ones."""
        torch.bitwise_right_shift(x, bits, out=shifted)
        return x.bitwise_xor_(shifted.bitwise_and_(_MASK32 >> bits))  # an int32 right shift replicates the sign bit

    x.bitwise_xor_(seed.to(torch.int32))
    fold(16).mul_(0x7FEB352D).add_(seed2.to(torch.int32))
    fold(15).mul_(0x846CA68B - 2**32)
    return fold(16)


def dropout_project(x_TK: Tensor, a_rK: Tensor, p: float, seed: Tensor, out_Tr: Tensor) -> None:
    """Writes `dropout(x) @ A.T` with the mask generated from `seed`."""
    out_Tr.copy_(wide(product(_dropped(x_TK, p, seed), a_rK.t())) / (1 - p))


def dropout_project_weight_grad(dxa_Tr: Tensor, x_TK: Tensor, p: float, seed: Tensor) -> Tensor:
    """Gradient of `dropout(x) @ A.T` with respect to A with the mask regenerated: (r, K), float32 or wider."""
    return wide(sum_of_products(dxa_Tr, _dropped(x_TK, p, seed))) / (1 - p)


def dropout_project_input_grad_(dx_TK: Tensor, dxa_Tr: Tensor, a_rK: Tensor, p: float, seed: Tensor) -> None:
    """Adds the gradient of `dropout(x) @ A.T` with respect to x to `dx`, with the mask regenerated."""
    extra = wide(product(dxa_Tr, a_rK)).mul_(_keep_like(dx_TK, p, seed))
    dx_TK.copy_(torch.add(dx_TK, extra, alpha=1 / (1 - p)))


def _dropped(x_TK: Tensor, p: float, seed: Tensor) -> Tensor:
    return x_TK * _keep_like(x_TK, p, seed)


def _keep_like(x_TK: Tensor, p: float, seed: Tensor) -> Tensor:
    """`dropout_keep` in the dtype of `x`: products of mixed dtypes are many times slower.

    On a CPU recent masks are cached, since generating one takes as long as the product that it is for.
    """

    def generate() -> Tensor:
        """A new mask."""
        return dropout_keep(x_TK.shape[0], x_TK.shape[1], p, seed).to(x_TK.dtype)

    return generate() if seed.device.type != 'cpu' else _MASKS.get((*x_TK.shape, p, int(seed), x_TK.dtype), generate)


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """Replaces logits by the gradient of the summed cross entropy, in place.

    Args:
        logits_TV: Any float dtype; afterwards `softmax(logits) - onehot(targets)`.
        targets_T: int64, all valid.

    Returns:
        float32 (T,), each row's loss.

    """
    logits = wide(logits_TV)  # no copy if they are float32 or wider; the passes below are in place
    logits.sub_(logits.amax(dim=-1, keepdim=True))
    rows = torch.arange(len(targets_T), device=targets_T.device)
    target_logits = logits[rows, targets_T]
    row_sum = logits.exp_().sum(dim=-1)
    loss = row_sum.log() - target_logits
    logits.div_(row_sum[:, None])
    logits[rows, targets_T] -= 1
    if logits is not logits_TV:
        logits_TV.copy_(logits)
    return loss


def wide(x: Tensor) -> Tensor:
    """Converts to float32; float64 stays float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _multiply_into(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """Writes a product computed in the dtype of `x`, without a temporary if `out` has that dtype."""
    if out.dtype == x.dtype:
        torch.mul(x, factor, out=out)
    else:
        out.copy_(x * factor)
