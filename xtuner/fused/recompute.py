"""How many layers are computed again in the backward pass: as few as the memory that is free allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from xtuner.fused.context import LayerParts

# Of the free memory on a GPU; a host's is shared with other programs and with what is read from disk.
_SHARE = {'cuda': 0.9, 'cpu': 0.5}
# Bytes still to come for each trained value: its gradient, a second copy where ranks add theirs up, two moments.
_BYTES_A_TRAINED_VALUE = 16
_LOSS_BYTES = 2**29  # logits and hidden states of the slices that the loss holds


def kept_bytes(parts: LayerParts, tokens: int, ranks: Sequence[int], item_bytes: int) -> int:
    """What a layer keeps for its backward pass where it is not computed again.

    Its input, q, k and v, the attention's output with a float32 for each head, the state between the halves, gate and
    up, and the adapters' projections.

    Args:
        parts: The layer.
        tokens: T.
        ranks: Sum of the adapters' ranks of each group.
        item_bytes: Bytes of one activation.

    """
    size = parts.qkv.num_in
    columns = 3 * size + parts.qkv.num_out + parts.gate_up.num_out + sum(ranks) + ranks[2]
    return tokens * (columns * item_bytes + 4 * parts.heads)


def working_bytes(parts: LayerParts, tokens: int, item_bytes: int) -> int:
    """What one layer's backward pass takes beside: a second set of its activations, the widest group's weight twice."""
    widest = max(group.num_in * group.num_out for group in parts.groups)
    return kept_bytes(parts, tokens, (0, 0, 0, 0), item_bytes) + 2 * widest * item_bytes


def activation_budget_bytes(free: int, num_trained: int, kind: str) -> int:
    """Bytes that activations may take on a device that holds model and adapters, but no gradients or moments yet.

    Args:
        free: `host.free_bytes` of it.
        num_trained: Trained values.
        kind: Of the device: 'cuda' or 'cpu'.

    """
    return int((free - num_trained * _BYTES_A_TRAINED_VALUE - _LOSS_BYTES) * _SHARE.get(kind, 0.5))


def gathered_bytes(layer: Iterable[Tensor], embedding: Tensor) -> int:
    """Bytes of frozen weights that `fully_shard` has whole at a time, at most, beside a rank's own rows.

    Two layers, the one that is computed and the one that comes next, each held twice: as it arrives and as it will lie.
    For the loss the head, once, with one layer on its way.

    Args:
        layer: A layer's parameters, in their whole shapes.
        embedding: Of the head's size.

    """
    one = sum(p.numel() * p.element_size() for p in layer)
    return max(4 * one, one + embedding.numel() * embedding.element_size())


def num_recomputed_layers(
    parts: LayerParts, ranks: Sequence[int], num_layers: int, *, tokens: int, item_bytes: int, room: int
) -> int:
    """How many of the layers, from the first on, must be computed again for the rest to fit into `room` bytes.

    The first ones, because the last ones' memory is free again by the time the first ones' backward passes come. The
    last layer never: its backward pass comes at once.

    Example:
        room for 5 of 8 layers' activations  ->  3

    """
    fitting = (room - working_bytes(parts, tokens, item_bytes)) // kept_bytes(parts, tokens, ranks, item_bytes)
    return num_layers - min(max(fitting, 1), num_layers)
