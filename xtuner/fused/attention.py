"""Causal attention within the samples of a batch, by the fastest available kernel for its shape.

Position ids tell where samples begin; they are read once per batch, not once per layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

_SHAPE_COUNTS: Counter[tuple] = Counter()  # batches seen of each shape: cuDNN plans every new shape, which is slow
_CUDNN_AFTER_BATCHES = 2
_AMPERE = (8, 0)  # minimum compute capability for cuDNN attention and FlashAttention in torch
# Maximum number of samples by batch shape; it only grows, so that batches of a shape share CUDA graphs.
_CAPACITY: defaultdict[tuple[int, int], int] = defaultdict(lambda: 16)


@dataclass
class Attention:
    """Attention for one batch.

    Attributes:
        rows: B.
        length: S.
        starts: Start of each sample in the flattened batch, followed by B * S; None if each row is one sample.
        cudnn: Whether cuDNN computes it (one sample per row, CUDA only).
        offsets: int32, `starts` on the GPU for variable-length FlashAttention, padded with empty samples, so that
            batches with similar numbers of samples have the same shape.

    """

    rows: int
    length: int
    starts: list[int] | None
    cudnn: bool = False
    offsets: Tensor | None = field(default=None, repr=False)

    def forward(self, q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, scale: float) -> Tensor:
        """Computes attention; differentiable.

        Args:
            q_TAD: Queries: T tokens of the flattened batch, A heads of size D; only the last dimension must be
                contiguous.
            k_TAD: Keys; the number of heads divides that of the queries.
            v_TAD: Values, with as many heads as the keys.
            scale: Scale of the scores.

        Returns:
            (T, A * D).

        """
        if self.starts is None:
            out = self._dense(q_TAD, k_TAD, v_TAD, scale)
        elif self.offsets is not None:
            out = _varlen(q_TAD, k_TAD, v_TAD, scale, self.offsets, self.length)
        else:
            samples = [
                _causal(q_TAD[None, a:b], k_TAD[None, a:b], v_TAD[None, a:b], scale)
                for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)
            ]
            out = torch.cat(samples, dim=1)
        return out.reshape(len(q_TAD), -1)

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.unflatten(0, (self.rows, self.length)) for x in (q, k, v))
        if not self.cudnn or q.shape[2] != k.shape[2]:
            return _causal(q, k, v, scale)
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        attend = torch.ops.aten._scaled_dot_product_cudnn_attention
        return attend(*heads_first, None, q.requires_grad, 0.0, True, False, scale=scale)[0].transpose(1, 2)

    @property
    def graph_key(self) -> tuple | None:
        """Batches with equal keys can share recorded CUDA graphs; None: this batch cannot be recorded."""
        if self.offsets is not None:
            return self.rows, self.length, len(self.offsets)
        return (self.rows, self.length) if self.cudnn else None

    def with_own_offsets(self) -> Attention:
        """A copy with its own memory for the offsets, for CUDA graphs."""
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
    """Finds the sample boundaries and selects the kernel.

    Args:
        position_ids: int64 (B, S), or (1, S) for all rows; None: each row is one sample.
        rows: B.
        length: S.
        device: Device of the batch.
        dtype: Dtype of queries, keys and values.
        head_size: D.

    """
    starts = None
    if position_ids is not None:
        breaks = torch.ones(rows, length, dtype=torch.bool, device=position_ids.device)
        breaks[:, 1:] = position_ids.diff(dim=1) != 1
        sample_starts = breaks.reshape(-1).nonzero().squeeze(1).tolist()
        if len(sample_starts) > rows:
            starts = [*sample_starts, rows * length]
    cudnn = False
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type == 'cuda' and starts is None and half and head_size <= 128 and not head_size % 8:
        shape = (rows, length, dtype, head_size)
        _SHAPE_COUNTS[shape] += 1
        cudnn = _SHAPE_COUNTS[shape] >= _CUDNN_AFTER_BATCHES and _has_cudnn_attention()
    offsets = None
    if starts is not None and half and _has_flash_attention(device, head_size):
        capacity = _CAPACITY[rows, length] = max(_CAPACITY[rows, length], 1 << (len(starts) - 2).bit_length())
        padded = starts + [rows * length] * (capacity + 1 - len(starts))
        offsets = torch.tensor(padded, dtype=torch.int32).to(device, non_blocking=True)
    return Attention(rows, length, starts, cudnn, offsets)


def _has_cudnn_attention() -> bool:
    return torch.backends.cudnn.is_available() and torch.cuda.get_device_capability() >= _AMPERE


def _has_flash_attention(device: torch.device, head_size: int) -> bool:
    """Whether torch's FlashAttention supports this device and head size; if not, samples are computed one by one."""
    if device.type != 'cuda' or head_size > 256 or head_size % 8:
        return False
    return torch.cuda.get_device_capability(device) >= _AMPERE
