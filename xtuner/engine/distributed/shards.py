"""Frozen weights on their way into `fully_shard`: 4-bit ones as plain parameters, and those that are cut already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtuner.kernels.quantized import is_4bit
from xtuner.model.sharded_loading import full_shapes, scales_as


@dataclass(frozen=True)
class Rows:
    """A rank's rows of one parameter that was cut while it was loaded."""

    module: nn.Module
    name: str
    rows: Tensor


def keep_quantisation_states(model: nn.Module) -> int:
    """Moves each 4-bit weight's state from the weight, which becomes a plain parameter, to its layer.

    The scales, one for 64 values, become a parameter as well, so that they are sharded too.

    Returns:
        How many layers have one.
    """
    count = 0
    for module in model.modules():
        if is_4bit(module):
            layer: Any = module
            layer.quant_state = layer.weight.quant_state
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
            layer.absmax = nn.Parameter(scales_as(layer.weight.dtype, layer.quant_state.absmax), requires_grad=False)
            count += 1
    return count


def read_scales_from_parameters(layer: nn.Module) -> None:
    """Lets states look at the whole scales, whose memory comes and goes with each unsharding but stays one tensor."""
    for module in layer.modules():
        if is_4bit(module):
            state: Any = module.quant_state
            scales: Tensor = module.absmax.detach()  # type: ignore[operator]
            count = -(-state.shape.numel() // state.blocksize)
            state.absmax = scales.view(torch.uint8)[:count] if state.nested else scales


def set_rows_aside(model: nn.Module) -> list[Rows]:
    """Puts a parameter without memory, of the whole shape, in the place of each one that is cut, for `fully_shard`."""
    aside = []
    for module in model.modules():
        for name, shape in full_shapes(module).items():
            own = module.get_parameter(name)
            aside.append(Rows(module, name, own.data))
            empty = torch.empty(shape, dtype=own.dtype, device='meta')
            module.register_parameter(name, nn.Parameter(empty, requires_grad=own.requires_grad))
    return aside


def put_rows_back(aside: list[Rows]) -> None:
    """Gives each sharded parameter the rows that this rank has of it.

    Raises:
        ValueError: they are other rows than `fully_shard` would have cut.
    """
    for one in aside:
        sharded: Any = one.module.get_parameter(one.name)
        if sharded.to_local().shape != one.rows.shape:
            raise ValueError(f'{one.name} of {one.module} was cut to {one.rows.shape}, not {sharded.to_local().shape}')
        rows = DTensor.from_local(
            one.rows, sharded.device_mesh, sharded.placements, run_check=False,
            shape=sharded.shape, stride=sharded.stride(),
        )  # fmt: skip
        one.module.register_parameter(one.name, nn.Parameter(rows, requires_grad=sharded.requires_grad))
