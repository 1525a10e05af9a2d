"""Host memory beside the GPU: embeddings looked up from it, checkpoints kept in it, an optimizer that waits once."""

from __future__ import annotations

import os
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class _Mapped:
    """Pinned host memory under the interface by which PyTorch takes over another library's CUDA memory."""

    def __init__(self, pinned: Tensor) -> None:
        self.pinned = pinned  # lives as long as the tensor made of it
        self.__cuda_array_interface__ = {
            'shape': tuple(pinned.shape),
            'typestr': '<i2',
            'data': (pinned.data_ptr(), False),
            'version': 3,
            'strides': None,
        }


def move_embedding_to_host(embedding: nn.Embedding) -> bool:
    """Moves a frozen half-precision embedding's weight to pinned host memory that the GPU reads directly.

    The parameter stays a CUDA tensor to all who use it (a lookup reads its rows over the bus); only its memory moves.

    Returns:
        Whether it was done; not where the host has too little memory or the driver does not map it.

    """
    weight = embedding.weight
    if not weight.is_cuda or weight.element_size() != 2 or weight.requires_grad or _is_mapped(weight):
        return _is_mapped(weight)
    if weight.numel() * 2 > free_host_bytes() // 4:
        return False
    try:
        pinned = torch.empty(weight.shape, dtype=torch.int16, pin_memory=True)
        pinned.copy_(weight.data.view(torch.int16))
        mapped = torch.as_tensor(_Mapped(pinned), device=weight.device).view(weight.dtype)
        rows = torch.tensor([0, weight.shape[0] // 2, weight.shape[0] - 1], device=weight.device)
        if mapped.data_ptr() != pinned.data_ptr() or not torch.equal(mapped[rows], weight.data[rows]):
            return False
    except RuntimeError:
        return False
    weight.data = mapped
    weight.on_host = True  # type: ignore[attr-defined]
    return True


def _is_mapped(weight: Tensor) -> bool:
    return bool(getattr(weight, 'on_host', False))


def free_host_bytes() -> int:
    """Free memory of this machine in bytes, 0 where it cannot be known."""
    try:
        return os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError, OSError):
        return 0


@dataclass
class HostStore:
    """Checkpointed layer inputs of one forward pass, copied to pinned memory while the GPU goes on, and back in time.

    Layers put their inputs in order and take them back in reverse; taking one starts the copy of the one before.
    """

    stream: torch.cuda.Stream
    kept: list[Tensor] = field(default_factory=list)
    coming: dict[int, tuple[Tensor, torch.cuda.Event]] = field(default_factory=dict)

    def put(self, x: Tensor) -> int:
        """Starts the copy to the host; returns the place."""
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            pinned.copy_(x, non_blocking=True)
        x.record_stream(self.stream)
        self.kept.append(pinned)
        return len(self.kept) - 1

    def take(self, place: int, device: torch.device) -> Tensor:
        """The tensor of a place, on the GPU; starts the copy of the place before."""
        if place not in self.coming:
            self._fetch(place, device)
        x, arrived = self.coming.pop(place)
        torch.cuda.current_stream().wait_event(arrived)
        if place:
            self._fetch(place - 1, device)
        return x

    def _fetch(self, place: int, device: torch.device) -> None:
        pinned = self.kept[place]
        x = torch.empty(pinned.shape, dtype=pinned.dtype, device=device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            x.copy_(pinned, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        self.coming[place] = (x, arrived)


def wait_once_a_step(optimizer: torch.optim.Optimizer) -> bool:
    """Makes a bitsandbytes optimizer wait for the GPU after a step instead of after each parameter.

    Its update of 448 adapter matrices takes 4 ms on an H200, the 448 waits 30 ms. The instance's `step` is replaced;
    state, arithmetic and what is saved stay the same.

    Returns:
        Whether it was done: False for other optimizers.

    """
    from bitsandbytes.optim.optimizer import Optimizer8bit

    if not isinstance(optimizer, Optimizer8bit):
        return False
    optimizer.step = types.MethodType(_step, optimizer)  # type: ignore[method-assign]
    return True


@torch.no_grad()
def _step(self: Any, closure: Any = None) -> Any:
    pending = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
    if closure is not None or not self.initialized or not all(len(self.state[p]) for p in pending):
        return type(self).step(self, closure)  # its own way of setting up
    for group_index, group in enumerate(self.param_groups):
        for index, p in enumerate(group['params']):
            if p.grad is not None:
                self.prefetch_state(p)
                self.update_step(group, p, group_index, index)
    if any(p.is_cuda for p in pending):
        torch.cuda.synchronize()  # paged state may be read by the host next
    return None
