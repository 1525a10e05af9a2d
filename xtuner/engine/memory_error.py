"""What to say when memory has run out: what takes it, what to turn, and which batch it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xtuner.config.schema import TrainConfig

_MOST_KNOBS = 3
_CPU_WORDS = ("can't allocate memory", 'not enough memory')  # of torch's allocator on a CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device or host memory has run out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in _CPU_WORDS)


def memory_knobs(config: TrainConfig) -> list[str]:
    """The three settings of a config that would save most, the ones that change the result least first."""
    schedule, adapter, quantization = config.schedule, config.adapter, config.quantization
    knobs = []
    if schedule.batch_size > 1:
        knobs.append(
            f'schedule.batch_size={schedule.batch_size // 2} with '
            f'schedule.accumulative_counts={schedule.accumulative_counts * 2}'
        )
    if not config.runtime.activation_checkpointing:
        knobs.append('runtime.activation_checkpointing=True')
    if adapter is not None and (quantization is None or quantization.bits > 4):
        knobs.append('quantization.bits=4')
    knobs.append(f'dataset.max_length={config.dataset.max_length // 2}')
    if adapter is None:
        knobs.append('a qlora config, which trains an adapter on a 4-bit base')
    elif isinstance(rank := adapter.get('r'), int) and rank > 1:
        knobs.append(f'adapter.r={rank // 2}')
    knobs.append('optimizer.type=bitsandbytes.optim:PagedAdamW8bit')
    return knobs[:_MOST_KNOBS]


def memory_message(runner: Any, micro_batches: Sequence[Mapping[str, Tensor]], knobs: Sequence[str]) -> str:
    """One line: device, the largest terms, what to turn, the form of the batch."""
    device = runner.train_loop.device
    terms = memory_terms(runner)
    largest = ', '.join(f'{name} {_gib(size)}' for name, size in sorted(terms.items(), key=lambda t: -t[1])[:3])
    total = f' of {_gib(torch.cuda.mem_get_info(device)[1])}' if device.type == 'cuda' else ''
    forms = ' and '.join(sorted({' x '.join(map(str, b['input_ids'].shape)) for b in micro_batches}))
    return (
        f'out of memory on {device}{total} with micro-batches of {forms} tokens; largest: {largest}; '
        f'try {", or ".join(knobs) if knobs else "smaller batches"}'
    )


def memory_terms(runner: Any) -> dict[str, int]:
    """Bytes on the training device by what holds them; the rest of the peak, known on a GPU, is the batch's."""
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


def _gib(size: int) -> str:
    return f'{size / 2**30:.2f} GiB'
