"""Products on a CPU by oneDNN, with weights laid out for it.

PyTorch gives float32 products to MKL, which takes an AMD processor's narrower instructions; oneDNN, which comes with
PyTorch as well, takes all that there are. Laid out beforehand, a weight is read from memory once and in order: for few
rows that is most of the time.

Letters of shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

_WORTH = 2**15  # values of a weight: below, the call costs more than the product
_WORTH_PRODUCT = 2**20  # multiplications of a product: below, the call costs more than it gains
_TYPICAL_ROWS = 16  # what the layout is chosen for; others are computed with it all the same


def can_lay_out(weight_NK: Tensor) -> bool:
    """Whether products with a weight are quicker here: float32, on a CPU, of some size, and oneDNN is there."""
    large = weight_NK.dtype == torch.float32 and weight_NK.numel() >= _WORTH
    return large and weight_NK.device.type == 'cpu' and available()


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this processor and this build of PyTorch have what `linear` calls."""
    return (
        torch.backends.cpu.get_cpu_capability().startswith('AVX')
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    )


@torch.no_grad()
def lay_out(weight_NK: Tensor) -> Tensor:
    """A copy of a weight that only `linear` can read, of the same size in memory."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), _TYPICAL_ROWS)


def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """As `torch.nn.functional.linear`, for any leading shape, without gradients.

    oneDNN compiles code for each number of rows and keeps it, some 0.5 ms and 0.5 MB each: rows are added to make it
    one of few numbers.

    Args:
        x_TK: float32.
        weight_NK: What `lay_out` returned, or a plain weight, which is slower.
        bias_N: float32, or None.
    """
    x = x_TK.reshape(-1, x_TK.shape[-1])
    missing = _usual_number(len(x)) - len(x)
    if missing:
        x = functional.pad(x, (0, 0, 0, missing))
    out = torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, 'none', [], '')
    return out[: len(out) - missing].view(*x_TK.shape[:-1], weight_NK.shape[0])


def _usual_number(rows: int) -> int:
    """The next power of two; of large numbers the next quarter of it, of very large ones the next eighth."""
    power = 1 << max(rows - 1, 0).bit_length()
    step = power // (1 if power < 64 else 4 if power <= 512 else 8)
    return -(-rows // step) * step if rows else 1


def product(x_TK: Tensor, weight_KN: Tensor, bias_N: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`x @ weight + bias`, without gradients, by oneDNN where it is quicker; any device, dtype and layout."""
    if _worth(x_TK, weight_KN.shape[1]):
        result = linear(x_TK, _dense(weight_KN).t(), bias_N)
        return result if out is None else out.copy_(result)
    if bias_N is None:
        return torch.mm(x_TK, weight_KN, out=out)
    return torch.addmm(bias_N, x_TK, weight_KN, out=out)


def add_product_(out_TN: Tensor, x_TK: Tensor, weight_KN: Tensor) -> Tensor:
    """Adds `x @ weight` to `out`, which may be some columns of a wider matrix."""
    if _worth(x_TK, weight_KN.shape[1]):
        return out_TN.add_(product(x_TK, weight_KN))
    return out_TN.addmm_(x_TK, weight_KN)


def sum_of_products(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """`left.T @ right`, a sum over rows, without gradients; as `product`."""
    if not _worth(left_TM, right_TN.shape[1]):
        return torch.mm(left_TM.t(), right_TN)
    missing = _usual_number(len(left_TM)) - len(left_TM)
    if missing:
        left_TM, right_TN = (functional.pad(x, (0, 0, 0, missing)) for x in (left_TM, right_TN))
    if left_TM.shape[1] > right_TN.shape[1]:  # the narrow one is best read first
        return linear(right_TN.t(), _dense(left_TM).t(), None).t()
    return linear(left_TM.t(), _dense(right_TN).t(), None)


def _worth(left: Tensor, columns: int) -> bool:
    """Whether oneDNN multiplies by so many columns faster than what PyTorch would call."""
    large = left.dtype == torch.float32 and left.numel() * columns >= _WORTH_PRODUCT
    return large and left.device.type == 'cpu' and available()


def _dense(x: Tensor) -> Tensor:
    """The factor dense by rows or by columns: oneDNN reads any other 1000 times as slowly."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()
