"""A rank's rows of a model's weights, cut off as each weight is loaded, so that no rank ever holds the whole model.

What is cut is the weight of every linear layer: read, put on its device, quantised whole (quantised scales depend on
all of them), cut, and the rest let go before the next one is read. So a rank needs its rows and one weight.
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
    """One rank's part of each weight.

    Attributes:
        rank: From 0.
        world_size: How many ranks there are.
    """

    rank: int
    world_size: int

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's rows as `torch.chunk` deals them, in memory of their own; none where there are too few.

        Example:
            of 5 rows, 2 ranks have 3 and 2; of 4 rows, 3 ranks have 2, 2 and 0
        """
        chunks = whole.chunk(self.world_size)
        return (chunks[self.rank] if self.rank < len(chunks) else whole[:0]).clone()


@contextmanager
def shard_on_load(share: ShardSpec, *, tied: bool) -> Iterator[None]:
    """In this block a linear layer's weight is cut to a rank's rows as soon as a module gets it.

    The layer remembers whole shapes (see `whole_shapes`); a 4-bit weight's scales are cut too. Embeddings stay whole.

    Args:
        share: Which rows.
        tied: Whether the head is an embedding's weight, and so stays whole too: where a checkpoint holds it all the
            same, transformers compares the two before it ties them.
    """
    embeddings: set[torch.Size] = set()
    done: dict[int, nn.Parameter] = {}

    def cut(module: nn.Module, name: str, parameter: Any) -> None:
        """Called by torch before a module takes a parameter."""
        if parameter is None or id(parameter) in done:
            return
        if isinstance(module, nn.Embedding):
            embeddings.add(parameter.shape)  # before any weight is there, too
        elif parameter.is_meta or (tied and parameter.shape in embeddings):
            return
        elif isinstance(module, nn.Linear) and name == 'weight':
            shapes = module.__dict__['whole_shapes'] = {'weight': parameter.shape}
            parameter.data = share.rows(parameter.data)
            state = getattr(parameter, 'quant_state', None)
            if state is not None:
                scales = scales_as(parameter.dtype, state.absmax)
                shapes['absmax'] = scales.shape
                state.absmax = share.rows(scales)
            done[id(parameter)] = parameter

    from transformers import modeling_utils as transformers

    # It begins by taking as much of a GPU's memory as the whole model needs, and its threads read ahead.
    warmup, synchronous = getattr(transformers, 'caching_allocator_warmup', None), os.environ.get(_SYNCHRONOUS)
    transformers.caching_allocator_warmup = lambda *args: None
    os.environ[_SYNCHRONOUS] = '1'
    hook = register_module_parameter_registration_hook(cut)
    try:
        yield
    finally:
        hook.remove()
        transformers.caching_allocator_warmup = warmup  # type: ignore[assignment]
        os.environ.pop(_SYNCHRONOUS) if synchronous is None else os.environ.update({_SYNCHRONOUS: synchronous})


def scales_as(dtype: torch.dtype, absmax: Tensor) -> Tensor:
    """A 4-bit weight's scales as floats, the only numbers that torch 2.11 shards: bytes side by side, then zeros."""
    if absmax.is_floating_point():
        return absmax
    return functional.pad(absmax, (0, -absmax.numel() % dtype.itemsize)).view(dtype)


def whole_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Of a layer whose weight was cut: the stored shapes before, of `weight` and of a 4-bit one's `scales_as`."""
    return module.__dict__.get('whole_shapes', {})


def num_parameters(model: nn.Module, *, trained: bool = False) -> int:
    """How many numbers a model's parameters, or those that are trained, are: of cut weights and 4-bit ones too."""
    total, seen = 0, set()
    for module in model.modules():
        shapes = whole_shapes(module)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or trained > parameter.requires_grad:
                continue
            seen.add(id(parameter))
            state = getattr(parameter, 'quant_state', None)  # has a 4-bit weight's own shape
            total += shapes.get(name, parameter.shape).numel() if state is None else state.shape.numel()
    return total
