"""The out-of-memory message: what takes the memory, what to change, and the batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtuner.utils.units import gib

_SHOWN = 3


def memory_message(runner: Any, micro_batches: Sequence[Mapping[str, Tensor]], advice: Sequence[str]) -> str:
    """Returns one line: device, the largest components, advice, the batch's shape."""
    device = runner.train_loop.device
    terms = memory_terms(runner)
    largest = ', '.join(f'{name} {gib(size)}' for name, size in sorted(terms.items(), key=lambda t: -t[1])[:_SHOWN])
    total = f' of {gib(torch.cuda.mem_get_info(device)[1])}' if device.type == 'cuda' else ''
    shapes = ' and '.join(sorted({' x '.join(map(str, b['input_ids'].shape)) for b in micro_batches}))
    return (
        f'out of memory on {device}{total} with micro-batches of {shapes} tokens; largest: {largest}; '
        f'{", or ".join(advice[:_SHOWN]) or "use smaller batches"}'
    )


def memory_terms(runner: Any) -> dict[str, int]:
    """Bytes on the training device by component; on a GPU the rest of the peak is the batch's."""
    device = runner.train_loop.device
    parameters = list(runner.model.parameters())
    terms = {
        'base weights': _bytes((p for p in parameters if not p.requires_grad), device),
        'trained weights': _bytes((p for p in parameters if p.requires_grad), device),
        'gradients': _bytes((p for p in parameters if p.requires_grad), device),
        'optimizer': _bytes(_tensors(runner.optim_wrapper.optimizer.state), device),
    }
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated(device)
        terms['activations, logits and buffers'] = max(0, peak - sum(terms.values()))
    return terms


def _tensors(state: Mapping[Any, Any]) -> Iterable[Tensor]:
    return (value for values in state.values() for value in values.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type == device.type)
