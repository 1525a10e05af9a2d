"""Packs spread over ranks: each holds a stretch of tokens, and for attention a share of the heads of all tokens.

DeepSpeed-Ulysses (arXiv:2309.14509). Norms, products and adapters work on a rank's own tokens; before attention one
all-to-all trades tokens for heads, after it another trades back, and the backward pass does the same. So attention
sees whole packs and any form of them goes, with as many samples as there are; torch's context-parallel API, which
rotates keys and values instead, takes one dense causal sequence a row (torch 2.13).

    before   rank 0: tokens 0-3, heads 0-3      rank 1: tokens 4-7, heads 0-3
    between  rank 0: tokens 0-7, heads 0-1      rank 1: tokens 0-7, heads 2-3

Letters beside the room's: P ranks that share a pack, B rows, S tokens of a row, s = S / P of them on this rank.
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
        rank: This one's place among them.
        size: P.
    """

    group: Any
    rank: int
    size: int

    def own(self, x_BS: Tensor) -> Tensor:
        """This rank's stretch of each row, (B, s)."""
        length = x_BS.shape[1] // self.size
        return x_BS[:, self.rank * length : (self.rank + 1) * length]

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' numbers."""
        found = torch.tensor([value], dtype=torch.int64, device=device)
        distributed.all_reduce(found, distributed.ReduceOp.MIN, group=self.group)
        return int(found.item())


@dataclass
class SharedAttention:
    """Attention for one batch whose rows are spread over ranks.

    Attributes:
        whole: Attention for the whole batch.
        ranks: Who shares it.
    """

    whole: Attention
    ranks: SequenceGroup

    @property
    def form(self) -> None:
        """None: messages between ranks are not recorded in graphs."""
        return None

    def forward(self, q_TAD: Tensor, k_TAD: Tensor, v_TAD: Tensor, scale: float) -> Tensor:
        """As `Attention.forward`, on T = B * s tokens and all heads."""
        size, rows = self.ranks.size, self.whole.rows
        counts = [x.shape[1] // size for x in (q_TAD, k_TAD, v_TAD)]
        # One message: for each receiver its heads of q, k and v side by side, (P, B, s, heads, D).
        parts = [x.unflatten(1, (size, -1)).unflatten(0, (rows, -1)) for x in (q_TAD, k_TAD, v_TAD)]
        sent = torch.cat(parts, dim=3).permute(2, 0, 1, 3, 4)
        got = _Exchange.apply(sent, self.ranks.group)  # from each sender its tokens
        heads = got.transpose(0, 1).flatten(1, 2).flatten(0, 1)
        q, k, v = heads.split(counts, dim=1)
        out = self.whole.forward(q, k, v, scale)  # (B * S, heads * D)
        back = out.unflatten(0, (rows, size, -1)).transpose(0, 1)
        return _Exchange.apply(back, self.ranks.group).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


class _Exchange(torch.autograd.Function):
    """Part p goes to rank p, and comes from rank p; its own inverse, hence its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """Sends and receives."""
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sends the gradients back the same way."""
        return _exchange(grad, ctx.group), None


def _exchange(x: Tensor, group: Any) -> Tensor:
    sent = x.contiguous()
    got = torch.empty_like(sent)
    distributed.all_to_all_single(got, sent, group=group)
    return got
