"""Sequence parallelism: each rank holds a slice of the tokens and, for attention, a share of the heads of all tokens.

DeepSpeed-Ulysses (arXiv:2309.14509). Norms, products and adapters work on a rank's own tokens; one all-to-all before
attention exchanges tokens for heads, another one after it reverses the exchange, and the backward pass does the same.
Attention therefore sees whole packs, with any number of samples; torch's context-parallel API, which rotates keys and
values instead, supports only one dense causal sequence per row (torch 2.13).

    before   rank 0: tokens 0-3, heads 0-3      rank 1: tokens 4-7, heads 0-3
    between  rank 0: tokens 0-7, heads 0-1      rank 1: tokens 0-7, heads 2-3

More shape letters: P ranks that share a pack, B rows, S tokens per row, s = S / P tokens per row on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from xtuner.fused.attention import Attention


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share packs.

    Attributes:
        group: Their process group.
        rank: This rank's index in the group.
        size: P.
    """

    group: Any
    rank: int
    size: int

    def local_slice(self, x_BS: Tensor) -> Tensor:
        """This rank's slice of each row, (B, s)."""
        length = x_BS.shape[1] // self.size
        return x_BS[:, self.rank * length : (self.rank + 1) * length]

    def all_reduce_min(self, value: int, device: torch.device) -> int:
        """Minimum of a value over the ranks."""
        result = torch.tensor([value], dtype=torch.int64, device=device)
        distributed.all_reduce(result, distributed.ReduceOp.MIN, group=self.group)
        return int(result.item())


@dataclass
class UlyssesAttention:
    """Attention for one batch whose rows are split over ranks.

    Attributes:
        whole: Attention for the whole batch.
        ranks: The ranks that share its rows.
    """

    whole: Attention
    ranks: SequenceGroup

    @property
    def graph_key(self) -> None:
        """None: collectives are not recorded in CUDA graphs."""
        return None

    def forward(self, q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, scale: float) -> Tensor:
        """Same as `Attention.forward`, for T = B * s tokens and all heads."""
        size, rows = self.ranks.size, self.whole.rows
        counts = [x.shape[1] // size for x in (q_TAD, k_TAD, v_TAD)]
        # One all-to-all: for each receiver its heads of q, k and v, concatenated, (P, B, s, heads, D).
        parts = [x.unflatten(1, (size, -1)).unflatten(0, (rows, -1)) for x in (q_TAD, k_TAD, v_TAD)]
        sent = torch.cat(parts, dim=3).permute(2, 0, 1, 3, 4)
        received = _AllToAll.apply(sent, self.ranks.group)  # the tokens of each sender
        heads = received.transpose(0, 1).flatten(1, 2).flatten(0, 1)
        q, k, v = heads.split(counts, dim=1)
        out = self.whole.forward(q, k, v, scale)  # (B * S, heads * D)
        returned = out.unflatten(0, (rows, size, -1)).transpose(0, 1)
        return _AllToAll.apply(returned, self.ranks.group).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


class _AllToAll(torch.autograd.Function):
    """Part p goes to rank p and is replaced by a part from rank p. Its own inverse, hence its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """Exchanges the parts."""
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Exchanges the gradients."""
        return _all_to_all(grad, ctx.group), None


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    sent = x.contiguous()
    received = torch.empty_like(sent)
    distributed.all_to_all_single(received, sent, group=group)
    return received
