"""The parts of a decoder layer, and the context of a forward pass: of the whole batch and of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from xtuner.fused.attention import Attention
from xtuner.fused.frozen import ComputePolicy, LoraWeights
from xtuner.fused.linear import LinearGroup
from xtuner.fused.offload import HostOffload


@dataclass
class LayerParts:
    """The frozen parts of one decoder layer.

    Attributes:
        qkv: The projections to queries, keys and values; their outputs are concatenated, or grouped by key head.
        out: The attention's output projection.
        gate_up: The MLP's gate and up projections.
        down: The MLP's down projection.
        norm_in: The RMS norm before attention.
        norm_mid: The RMS norm before the MLP.
        heads: Number of query heads.
        kv_heads: Number of key heads, and of value heads.
        head_size: D.
        scale: Scale of the attention scores.
        by_key_head: Whether the columns of `qkv` are grouped by key head: its query heads, the key, the value.
    """

    qkv: LinearGroup
    out: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    norm_in: nn.Module
    norm_mid: nn.Module
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    by_key_head: bool = False

    @property
    def groups(self) -> tuple[LinearGroup, LinearGroup, LinearGroup, LinearGroup]:
        """The groups of linear layers, in the order of the forward pass."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass
class StepContext:
    """What all layers share in one forward pass.

    Attributes:
        policy: How matrix products are computed.
        attention: Attention within the samples of the batch.
        cos: float32 (T, D / 2), of the rotary embedding.
        sin: float32 (T, D / 2).
        seeds: int64 (L, 4, 16), seeds of the dropout masks, by layer, group and projection of the group.
        num_recomputed: How many layers, from the first on, save only their input and are recomputed.
        offload: Holds those inputs in host memory; None: they stay on the device.

    """

    policy: ComputePolicy
    attention: Attention
    cos: Tensor
    sin: Tensor
    seeds: Tensor
    num_recomputed: int
    offload: HostOffload | None = None


@dataclass
class LayerContext:
    """One layer in one forward pass: its index and parts, and its adapters, a list for each group."""

    number: int
    parts: LayerParts
    batch: StepContext
    adapters: list[list[LoraWeights | None]]

    @property
    def is_recomputed(self) -> bool:
        """Whether the backward pass recomputes this layer."""
        return self.number < self.batch.num_recomputed

    def seeds(self, group: int) -> Tensor:
        """Seeds of a group's dropout masks, int64 (16,)."""
        return self.batch.seeds[self.number, group]

    def ranks(self, group: int) -> int:
        """Number of columns to append for a group's adapters: their ranks together if LoRA is fused, else 0."""
        return sum(a.rank for a in self.adapters[group] if a) if self.batch.policy.fused_lora else 0
