"""What a decoder layer is made of, what all layers share in one forward pass, and one layer in it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xtuner.fused.attention import Attention
from xtuner.fused.frozen import LoraWeights
from xtuner.fused.linear import ComputePolicy, Group
from xtuner.fused.offload import HostOffload


@dataclass
class LayerParts:
    """The frozen parts of one decoder layer.

    Attributes:
        qkv: The product to queries, keys and values, side by side, or by key head.
        by_key_head: Whether that product's columns are grouped by key head: its query heads, the key, the value.
    """

    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    norm_in: nn.Module
    norm_mid: nn.Module
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    by_key_head: bool = False

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order of the forward pass."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass
class StepContext:
    """What all layers share in one forward pass.

    Attributes:
        how: Kernels, dtype, folding.
        attention: For this batch's samples.
        cos: (T, D / 2), float32.
        sin: Likewise.
        seeds: int64 (L, 4, 16): of the dropout masks, by layer, group and layer of the group.
        num_recomputed: How many layers, from the first on, keep only their input and are computed again.
        store: Where those inputs are kept on the host, or None.

    """

    how: ComputePolicy
    attention: Attention
    cos: Tensor
    sin: Tensor
    seeds: Tensor
    num_recomputed: int
    store: HostOffload | None = None


@dataclass
class LayerContext:
    """One layer in one forward pass: its number and parts, its adapters (a list for each group)."""

    number: int
    parts: LayerParts
    batch: StepContext
    adapters: list[list[LoraWeights | None]]

    @property
    def again(self) -> bool:
        """Whether the backward pass computes this layer again."""
        return self.number < self.batch.num_recomputed

    def seeds(self, group: int) -> Tensor:
        """Of a group's dropout masks, int64 (16,)."""
        return self.batch.seeds[self.number, group]

    def ranks(self, group: int) -> int:
        """The columns to append for a group's adapters."""
        return sum(a.rank for a in self.adapters[group] if a) if self.batch.how.fused_lora else 0
