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
from torch.nn.modules.module import register_module_parameter_registration_hook

_SYNCHRONOUS = 'HF_DEACTIVATE_ASYNC_LOAD'


@dataclass(frozen=True)
class Share:
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
def cut_while_loading(share: Share) -> Iterator[None]:
    """In this block a linear layer's weight is cut to a rank's rows as soon as a module gets it.

    The layer remembers whole shapes (see `whole_shapes`); a 4-bit weight's scales are cut too. What an embedding
    holds, and a head that is tied to it, stays whole.
    """
    whole: dict[int, nn.Parameter] = {}  # parameters that stay as they are: an embedding's, and those cut already

    def cut(module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is None or parameter.is_meta or id(parameter) in whole:
            return
        if isinstance(module, nn.Embedding):
            whole[id(parameter)] = parameter
        elif isinstance(module, nn.Linear) and name == 'weight':
            shapes = module.__dict__['whole_shapes'] = {'weight': parameter.shape}
            parameter.data = share.rows(parameter.data)
            state = getattr(parameter, 'quant_state', None)
            if state is not None:
                shapes['absmax'] = state.absmax.shape
                state.absmax = share.rows(state.absmax)
            whole[id(parameter)] = parameter

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


def whole_shapes(module: nn.Module) -> dict[str, torch.Size]:
    """Of a layer whose weight was cut: the stored shapes before, of `weight` and of a 4-bit one's `absmax`."""
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
