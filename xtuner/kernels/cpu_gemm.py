"""Matrix products on a CPU with oneDNN and prepacked weights.

PyTorch computes float32 products with MKL, which uses narrower instructions on AMD processors; oneDNN, which is also
part of PyTorch, uses the widest available. A prepacked weight is read from memory once and sequentially, which is most
of the time for few rows.

Shape letters: T rows, K inputs, N outputs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

_MIN_WEIGHT_VALUES = 2**15  # below this weight size, the call overhead exceeds the product
_MIN_MULTIPLICATIONS = 2**20  # below this product size, the call overhead exceeds the gain
_TYPICAL_ROWS = 16  # the number of rows for which the layout is chosen; other numbers use the same layout


def can_pack(weight_NK: Tensor) -> bool:
    """Whether oneDNN is faster for a weight: float32, on a CPU, large enough, and oneDNN is available."""
    large = weight_NK.dtype == torch.float32 and weight_NK.numel() >= _MIN_WEIGHT_VALUES
    return large and weight_NK.device.type == 'cpu' and available()


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this processor and this PyTorch build support what `linear` calls."""
    return (
        torch.backends.cpu.get_cpu_capability().startswith('AVX')
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )


@torch.no_grad()
def pack_weight(weight_NK: Tensor) -> Tensor:
    """Copies a weight into oneDNN's packed layout, of the same size, which only `linear` can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), _TYPICAL_ROWS)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Same as `torch.nn.functional.linear`, for any leading shape, without gradients.

    oneDNN compiles and caches code for each number of rows (about 0.5 ms and 0.5 MB each), so rows are padded to one of
    few numbers.

    Args:
        x_TK: float32.
        weight_NK: A weight packed by `pack_weight`, or a plain weight, which is slower.
        bias_N: float32, or None.
    """
    x = x_TK.reshape(-1, x_TK.shape[-1])
    padding = _padded_rows(len(x)) - len(x)
    if padding:
        x = functional.pad(x, (0, 0, 0, padding))
    out = torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, 'none', [], '')
    return out[: len(out) - padding].view(*x_TK.shape[:-1], weight_NK.shape[0])


def _padded_rows(rows: int) -> int:
    """Rounds up to a power of two; large numbers to a quarter, very large ones to an eighth of it."""
    power = 1 << max(rows - 1, 0).bit_length()
    step = power // (1 if power < 64 else 4 if power <= 512 else 8)
    return -(-rows // step) * step if rows else 1


def product(x_TK: Tensor, weight_KN: Tensor, bias_N: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`x @ weight + bias` without gradients, by oneDNN where that is faster; any device, dtype and layout."""
    if _use_onednn(x_TK, weight_KN.shape[1]):
        result = linear(x_TK, _dense(weight_KN).t(), bias_N)
        return result if out is None else out.copy_(result)
    if bias_N is None:
        return torch.mm(x_TK, weight_KN, out=out)
    return torch.addmm(bias_N, x_TK, weight_KN, out=out)


def add_product_(out_TN: Tensor, x_TK: Tensor, weight_KN: Tensor) -> Tensor:
    """Adds `x @ weight` to `out`, which may be a column slice of a wider matrix."""
    if _use_onednn(x_TK, weight_KN.shape[1]):
        return out_TN.add_(product(x_TK, weight_KN))
    return out_TN.addmm_(x_TK, weight_KN)


def sum_of_products(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """`left.T @ right`, a sum over rows, without gradients; uses oneDNN as `product` does."""
    if not _use_onednn(left_TM, right_TN.shape[1]):
        return torch.mm(left_TM.t(), right_TN)
    padding = _padded_rows(len(left_TM)) - len(left_TM)
    if padding:
        left_TM, right_TN = (functional.pad(x, (0, 0, 0, padding)) for x in (left_TM, right_TN))
    if left_TM.shape[1] > right_TN.shape[1]:  # faster with the narrow factor first
        return linear(right_TN.t(), _dense(left_TM).t(), None).t()
    return linear(left_TM.t(), _dense(right_TN).t(), None)


def _use_onednn(left: Tensor, columns: int) -> bool:
    """Whether oneDNN is faster than PyTorch's default for a product with so many output columns."""
    large = left.dtype == torch.float32 and left.numel() * columns >= _MIN_MULTIPLICATIONS
    return large and left.device.type == 'cpu' and available()


def _dense(x: Tensor) -> Tensor:
    """Makes the factor contiguous by rows or columns; oneDNN is 1000 times slower on any other layout."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
