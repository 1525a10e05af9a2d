"""Products on a CPU by oneDNN, with weights laid out for it.

PyTorch gives float32 products to MKL, which takes an AMD processor's narrower instructions; oneDNN, which comes with
PyTorch as well, takes all that there are. Laid out beforehand, a weight is read from memory once and in order: for few
rows that is most of the time.

Letters of shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_WORTH = 2**15  # values of a weight: below, the call costs more than the product
_TYPICAL_ROWS = 16  # what the layout is chosen for; others are computed with it all the same


def can_lay_out(weight_NK: Tensor) -> bool:
    """Whether products with a weight are quicker here: float32, on a CPU, of some size, and oneDNN is there."""
    return (
        weight_NK.device.type == 'cpu'
        and weight_NK.dtype == torch.float32
        and weight_NK.numel() >= _WORTH
        and torch.backends.cpu.get_cpu_capability().startswith('AVX')
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
    """The next power of two; of large numbers three quarters of it, where that is enough."""
    power = 1 << max(rows - 1, 0).bit_length()
    return 3 * power // 4 if power >= 64 and rows <= 3 * power // 4 else power
