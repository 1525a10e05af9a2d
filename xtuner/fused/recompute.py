"""How many layers are recomputed in the backward pass: as few as the free memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from xtuner.fused.context import LayerParts

# Usable fraction of the free memory; a host's is shared with other programs and the page cache.
_SHARE = {'cuda': 0.9, 'cpu': 0.5}
# Bytes not yet allocated per trainable value: gradient, a second copy for its all-reduce, two moments.
_BYTES_A_TRAINED_VALUE = 16
_LOSS_BYTES = 2**29  # logits and hidden states of the slices of the loss


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
