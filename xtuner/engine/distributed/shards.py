"""Prepares frozen weights for `fully_shard`: 4-bit weights as plain parameters, and weights sharded at loading."""

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
    """A rank's rows of a parameter that was sharded while it was loaded."""

    module: nn.Module
    name: str
    rows: Tensor


def keep_quantization_states(model: nn.Module) -> int:
    """Moves each 4-bit weight's quantization state from the weight, which becomes a plain parameter, to its layer.

    The scales, one per 64 values, become a parameter too, so that they are sharded.

    Returns:
        The number of 4-bit layers.
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
    """Makes quantization states use the gathered scales: one tensor, whose memory changes with each unsharding."""
    for module in layer.modules():
        if is_4bit(module):
            state: Any = module.quant_state
            scales: Tensor = module.absmax.detach()  # type: ignore[operator]
            count = -(-state.shape.numel() // state.blocksize)
            state.absmax = scales.view(torch.uint8)[:count] if state.nested else scales


def detach_rows(model: nn.Module) -> list[Rows]:
    """Replaces each presharded parameter by a meta parameter of the full shape, for `fully_shard`."""
    detached = []
    for module in model.modules():
        for name, shape in full_shapes(module).items():
            parameter = module.get_parameter(name)
            detached.append(Rows(module, name, parameter.data))
            empty = torch.empty(shape, dtype=parameter.dtype, device='meta')
            module.register_parameter(name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    return detached


def attach_rows(detached: list[Rows]) -> None:
    """Gives each sharded parameter this rank's rows.

    Raises:
        ValueError: The rows differ from those that `fully_shard` would have selected.
    """
    for one in detached:
        sharded: Any = one.module.get_parameter(one.name)
        if sharded.to_local().shape != one.rows.shape:
            raise ValueError(f'{one.name} of {one.module} has {one.rows.shape}, not {sharded.to_local().shape}')
        rows = DTensor.from_local(
            one.rows, sharded.device_mesh, sharded.placements, run_check=False,
            shape=sharded.shape, stride=sharded.stride(),
        )  # fmt: skip
        one.module.register_parameter(one.name, nn.Parameter(rows, requires_grad=sharded.requires_grad))
