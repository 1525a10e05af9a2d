"""How many layers are recomputed in the backward pass (as few as the free memory allows), and what is offloaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from xtuner.fused.context import LayerContext, LayerParts
from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS, adapters_in
from xtuner.fused.offload import HostOffload, free_bytes, free_host_bytes
from xtuner.fused.ulysses import SequenceGroup

# Usable fraction of the free memory; a host's is shared with other programs and the page cache.
_SHARE = {'cuda': 0.9, 'cpu': 0.5}
# Bytes not yet allocated per trainable value: gradient, a second copy for its all-reduce, two moments.
_BYTES_A_TRAINED_VALUE = 16
_LOSS_BYTES = 2**29  # logits and hidden states of the slices of the loss
_LOGGER = logging.getLogger('xtuner')


def saved_bytes(parts: LayerParts, tokens: int, ranks: Sequence[int], item_bytes: int) -> int:
    """Bytes of activations that a layer saves for its backward pass if it is not recomputed.

    Its input, q, k and v, the attention's output with one float32 per head, the hidden states between attention and
    MLP, gate and up, and the adapters' projections.

    Args:
        parts: The layer.
        tokens: T.
        ranks: Sum of the adapters' ranks, for each group.
        item_bytes: Bytes per activation.

    """
    size = parts.qkv.num_in
    columns = 3 * size + parts.qkv.num_out + parts.gate_up.num_out + sum(ranks) + ranks[2]
    return tokens * (columns * item_bytes + 4 * parts.heads)


def working_bytes(parts: LayerParts, tokens: int, item_bytes: int) -> int:
    """Peak extra memory of one layer's backward: a second copy of its activations, two of its largest fused weight."""
    widest = max(group.num_in * group.num_out for group in parts.groups)
    return saved_bytes(parts, tokens, (0, 0, 0, 0), item_bytes) + 2 * widest * item_bytes


def activation_budget_bytes(free: int, num_trained: int, kind: str) -> int:
    """Bytes available for activations on a device that holds model and adapters, but no gradients or moments yet.

    Args:
        free: `offload.free_bytes` of the device.
        num_trained: Number of trainable values.
        kind: Device type, 'cuda' or 'cpu'.

    """
    return int((free - num_trained * _BYTES_A_TRAINED_VALUE - _LOSS_BYTES) * _SHARE.get(kind, 0.5))


def gathered_bytes(layer: Iterable[Tensor], embedding: Tensor) -> int:
    """Peak bytes of frozen weights that `fully_shard` gathers, in addition to a rank's own shards.

    Two layers, the current one and the prefetched one, each twice: the output of its all-gather and the copy in its
    final layout. For the loss, the head once, and one prefetched layer.

    Args:
        layer: Parameters of a layer, with their full shapes.
        embedding: A tensor of the size of the head.
    """
    one = sum(p.numel() * p.element_size() for p in layer)
    return max(4 * one, one + embedding.numel() * embedding.element_size())


def num_recomputed_layers(
    parts: LayerParts, ranks: Sequence[int], num_layers: int, *, tokens: int, item_bytes: int, budget: int
) -> int:
    """How many layers, from the first on, must be recomputed so that the activations of the rest fit into `budget`.

    The first layers are recomputed, because the memory of the last ones is free again when the backward pass reaches
    the first ones. The last layer is never recomputed, since its backward pass comes first.

    Args:
        parts: A layer.
        ranks: Sum of the adapters' ranks, for each group.
        num_layers: Number of layers.
        tokens: T.
        item_bytes: Bytes per activation.
        budget: Bytes available for activations.

    Example:
        budget for the activations of 5 out of 8 layers  ->  3

    """
    fitting = (budget - working_bytes(parts, tokens, item_bytes)) // saved_bytes(parts, tokens, ranks, item_bytes)
    return num_layers - min(max(fitting, 1), num_layers)


class ActivationMemory:
    """Activation memory of one decoder.

    Args:
        decoder: The transformers decoder.
        by_memory: Recompute only as many layers as the free memory requires; False follows the decoder's own
            checkpointing setting (all layers but the last, or none).
        sharded: Whether `fully_shard` gathers the weights of each layer.

    Attributes:
        budget: Bytes available for activations; None until the first batch.
        offload_from_bytes: Smallest total size of the layers' inputs that is offloaded.
    """

    def __init__(self, decoder: Any, *, by_memory: bool, sharded: bool) -> None:
        self.by_memory = by_memory
        self.budget: int | None = None
        self.offload_from_bytes = 2**28
        self._decoder, self._sharded = decoder, sharded
        self._reported: int | None = None
        self._copy_stream: Any = None
        self._pinned_bytes = 0  # PyTorch reuses pinned memory: it is not free, but available to us

    def num_recomputed(self, layers: list[LayerContext], x_TH: Tensor, sequence: SequenceGroup | None) -> int:
        """How many layers, from the first on, save only their input and are recomputed in the backward pass."""
        if not self.by_memory:
            return len(layers) - 1 if getattr(self._decoder.layers[0], 'gradient_checkpointing', False) else 0
        if self.budget is None:
            self.budget = self._measure_budget(layers, x_TH.device, sequence)
        ranks = [sum(a.rank for a in group if a) for group in layers[0].adapters]
        item_bytes = layers[0].batch.policy.dtype.itemsize
        num_recomputed = num_recomputed_layers(
            layers[0].parts, ranks, len(layers), tokens=len(x_TH), item_bytes=item_bytes, budget=self.budget
        )
        if self._reported is None or num_recomputed > self._reported:
            self._reported = num_recomputed
            _LOGGER.info(
                'activation budget %.1f GiB; recomputing %d of %d layers at %d tokens',
                self.budget / 2**30, num_recomputed, len(layers), len(x_TH),
            )  # fmt: skip
        return num_recomputed

    def _measure_budget(self, layers: list[LayerContext], device: torch.device, sequence: SequenceGroup | None) -> int:
        parameters = (p for layer in layers for a in adapters_in(layer) for p in (a.a_rK, a.b_Nr))
        num_trained = sum(getattr(p, '_local_tensor', p).numel() for p in parameters)  # of a DTensor, the local shard
        free = free_bytes(device)
        if self._sharded:
            free -= gathered_bytes(self._decoder.layers[0].parameters(), self._decoder.embed_tokens.weight)
        budget = activation_budget_bytes(free, num_trained, device.type)
        # Recomputation repeats the all-to-all of attention, so all ranks must recompute the same layers.
        return budget if sequence is None else sequence.all_reduce_min(budget, device)

    def host_offload(self, layers: list[LayerContext], x_TH: Tensor) -> HostOffload | None:
        """Where recomputed layers save their inputs: on the host if they are large and fit there, else None."""
        num_recomputed = layers[0].batch.num_recomputed
        inputs = x_TH.numel() * x_TH.element_size() * num_recomputed
        available = free_host_bytes() // 2
        if (
            not num_recomputed
            or not x_TH.is_cuda
            or inputs < self.offload_from_bytes
            or inputs * 2 > available + self._pinned_bytes
        ):
            return None
        if self._copy_stream is None:
            self._copy_stream = torch.cuda.Stream()
        ratio = 2 + layers[0].parts.down.num_in / x_TH.shape[1]  # size of all three tensors relative to the inputs
        all_three = len(x_TH) > MAX_GRAPH_TOKENS and inputs * ratio * 2 < available + self._pinned_bytes
        self._pinned_bytes = max(self._pinned_bytes, int(inputs * (ratio if all_three else 1)))
        return HostOffload(self._copy_stream, x_TH.device, 3 if all_three else 1)
