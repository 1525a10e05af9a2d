"""Loads only a rank's rows of a model's weights: each weight is sharded as it is loaded.

The weight of every linear layer is read, moved to its device, quantized as a whole (its scales depend on all values),
sliced, and the rest freed before the next one is read. A rank thus needs memory for its rows and one weight.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_parameter_registration_hook

_SYNCHRONOUS = 'HF_DEACTIVATE_ASYNC_LOAD'


@dataclass(frozen=True)
class ShardSpec:
    """One rank's share of each weight.

    Attributes:
        rank: Rank, from 0.
        world_size: Number of ranks.
    """

    rank: int
    world_size: int

    def rows(self, whole: Tensor) -> Tensor:
        """Returns a copy of this rank's rows, as `torch.chunk` splits them; empty if there are too few.

        Example:
            of 5 rows, 2 ranks get 3 and 2; of 4 rows, 3 ranks get 2, 2 and 0
        """
        chunks = whole.chunk(self.world_size)
        return (chunks[self.rank] if self.rank < len(chunks) else whole[:0]).clone()


@contextmanager
def shard_on_load(share: ShardSpec, *, tied: bool) -> Iterator[None]:
    """Within this block, a linear layer's weight is sliced to a rank's rows as soon as a module gets it.

    The layer records the full shapes (see `full_shapes`); a 4-bit weight's scales are sliced too. Embeddings stay
    whole.

    Args:
        share: The rank's share.
        tied: Whether the head is tied to the embedding and so stays whole too: if a checkpoint stores it anyway,
            transformers compares the two before tying them.
    """
    embeddings: set[torch.Size] = set()
    done: dict[int, nn.Parameter] = {}

    def shard(module: nn.Module, name: str, parameter: Any) -> None:
        """Called by torch before a module registers a parameter."""
        if parameter is None or id(parameter) in done:
            return
        if isinstance(module, nn.Embedding):
            embeddings.add(parameter.shape)  # also before any weight is loaded
        elif parameter.is_meta or (tied and parameter.shape in embeddings):
            return
        elif isinstance(module, nn.Linear) and name == 'weight':
            shapes = module.__dict__['full_shapes'] = {'weight': parameter.shape}
            parameter.data = share.rows(parameter.data)
            state = getattr(parameter, 'quant_state', None)
            if state is not None:
                scales = scales_as(parameter.dtype, state.absmax)
                shapes['absmax'] = scales.shape
                state.absmax = share.rows(scales)
            done[id(parameter)] = parameter

    from transformers import modeling_utils as transformers

    # It allocates as much GPU memory as the whole model needs, and its threads read ahead.
    warmup, synchronous = getattr(transformers, 'caching_allocator_warmup', None), os.environ.get(_SYNCHRONOUS)
    transformers.caching_allocator_warmup = lambda *args: None
    os.environ[_SYNCHRONOUS] = '1'
    hook = register_module_parameter_registration_hook(shard)
    try:
        yield
    finally:
        hook.remove()
        transformers.caching_allocator_warmup = warmup  # type: ignore[assignment]
        os.environ.pop(_SYNCHRONOUS) if synchronous is None else os.environ.update({_SYNCHRONOUS: synchronous})


def scales_as(dtype: torch.dtype, absmax: Tensor) -> Tensor:
    """A 4-bit weight's scales as floats, the only dtype that torch 2.11 shards: bytes reinterpreted, zero-padded."""
    if absmax.is_floating_point():
        return absmax
    return functional.pad(absmax, (0, -absmax.numel() % dtype.itemsize)).view(dtype)


def full_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """For a layer with a sharded weight, the unsharded shapes of `weight` and of a 4-bit weight's `scales_as`."""
    return module.__dict__.get('full_shapes', {})


def num_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """Number of parameters, or of trained ones, counting sharded and 4-bit weights in full."""
    total, seen = 0, set()
    for module in model.modules():
        shapes = full_shapes(module)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or trained > parameter.requires_grad:
                continue
            seen.add(id(parameter))
            state = getattr(parameter, 'quant_state', None)  # has a 4-bit weight's original shape
            total += shapes.get(name, parameter.shape).numel() if state is None else state.shape.numel()
    return total
