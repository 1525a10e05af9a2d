"""Causal attention within samples, on the fastest routine for the batch's form.

Position ids say where samples begin; they are read once a batch, not once a layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

_SEEN: Counter[tuple] = Counter()  # how many batches had a form: cuDNN plans each new one, which takes a while
_CUDNN_AFTER = 2
_AMPERE = (8, 0)  # compute capability below which torch has neither cuDNN's attention nor FlashAttention
# Samples that batches of a shape have room for: grows to the most that came, so that batches keep one form.
_ROOM: defaultdict[tuple[int, int], int] = defaultdict(lambda: 16)


@dataclass
class Attention:
    """Attention for one batch.

    Attributes:
        rows: B.
        length: S.
        starts: Where samples begin in the flattened batch and, last, B * S; None where each row is one sample.
        cudnn: Whether cuDNN computes it (a row a sample, CUDA only).
        offsets: int32, `starts` on the GPU, its end repeated up to a round number of (empty) samples, so that batches
            with about as many samples have the same form.

    """

    rows: int
    length: int
    starts: list[int] | None
    cudnn: bool = False
    offsets: Tensor | None = field(default=None, repr=False)

    def forward(self, q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, scale: float) -> Tensor:
        """Attends, differentiably.

        Args:
            q_TAD: Queries: T tokens of the flattened batch, A heads of size D; any strides but the last.
            k_TAD: Keys, heads as in `v`, their number a divisor of the queries'.
            v_TAD: Values.
            scale: Factor on the scores.

        Returns:
            (T, A * D).

        """
        if self.starts is None:
            out = self._dense(q_TAD, k_TAD, v_TAD, scale)
        elif self.offsets is not None:
            out = _varlen(q_TAD, k_TAD, v_TAD, scale, self.offsets, self.length)
        else:
            pieces = [
                _causal(q_TAD[None, a:b], k_TAD[None, a:b], v_TAD[None, a:b], scale)
                for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)
            ]
            out = torch.cat(pieces, dim=1)
        return out.reshape(len(q_TAD), -1)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.unflatten(0, (self.rows, self.length)) for x in (q, k, v))
        if not self.cudnn or q.shape[2] != k.shape[2]:
            return _causal(q, k, v, scale)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        return attend(*heads_first, None, q.requires_grad, 0.0, True, False, scale=scale)[0].transpose(1, 2)

    @property
    def form(self) -> tuple | None:
        """What batches must share to share recorded graphs; None where this one cannot be recorded."""
        if self.offsets is not None:
            return self.rows, self.length, len(self.offsets)
        return (self.rows, self.length) if self.cudnn else None

    def fixed(self) -> Attention:
        """The same with offsets in memory of their own."""
        offsets = None if self.offsets is None else self.offsets.clone()
        return Attention(self.rows, self.length, self.starts, self.cudnn, offsets)


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, offsets: Tensor, longest: int) -> Tensor:
    attend = torch.ops.aten._flash_attention_forward
    return attend(q, k, v, offsets, offsets, longest, longest, 0.0, True, False, scale=scale)[0]


def _causal(q_BSAD: Tensor, k_BSAD: Tensor, v_BSAD: Tensor, scale: float) -> Tensor:
    grouped = q_BSAD.shape[2] != k_BSAD.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BSAD, k_BSAD, v_BSAD))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def attention_for(
    position_ids: Tensor | None, rows: int, length: int, *, device: torch.device, dtype: torch.dtype, head_size: int
) -> Attention:
    """Reads where samples begin and picks the routine.

    Args:
        position_ids: int64 (B, S), or (1, S) for all rows; None where each row is one sample.
        rows: B.
        length: S.
        device: Where the batch is.
        dtype: Of the products.
        head_size: D.

    """
    starts = None
    if position_ids is not None:
        breaks = torch.ones(rows, length, dtype=torch.bool, device=position_ids.device)
        breaks[:, 1:] = position_ids.diff(dim=1) != 1
        found = breaks.reshape(-1).nonzero().squeeze(1).tolist()
        if len(found) > rows:
            starts = [*found, rows * length]
    cudnn = False
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == 'cuda' and starts is None and half and head_size <= 128 and not head_size % 8:
        form = (rows, length, dtype, head_size)
        _SEEN[form] += 1
        cudnn = _SEEN[form] >= _CUDNN_AFTER and _has_cudnn_attention()
    offsets = None
    if starts is not None and half and _has_flash_attention(device, head_size):
        room = _ROOM[rows, length] = max(_ROOM[rows, length], 1 << (len(starts) - 2).bit_length())
        padded = starts + [rows * length] * (room + 1 - len(starts))
        offsets = torch.tensor(padded, dtype=torch.int32).to(device, non_blocking=True)
    return Attention(rows, length, starts, cudnn, offsets)


def _has_cudnn_attention() -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= _AMPERE


def _has_flash_attention(device: torch.device, head_size: int) -> bool:
    """Whether torch's FlashAttention computes heads of this size here; elsewhere samples are computed one by one."""
    if device.type != 'cuda' or head_size > 256 or head_size % 8:
        return False
    return torch.cuda.get_device_capability(device) >= _AMPERE
