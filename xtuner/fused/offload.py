"""Host memory for training on a GPU: embeddings in it, activations offloaded to it; one sync per optimizer step."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xtuner import ranks
from xtuner.utils.host_memory import available_bytes

_PREFETCH_EVERY = 64


class _MappedHostMemory:
    """Exposes pinned host memory as CUDA memory, by the CUDA array interface."""

    def __init__(self, pinned: Tensor) -> None:
        self.pinned = pinned  # kept alive by the tensor that is created from this object
        self.__cuda_array_interface__ = {
            'shape': tuple(pinned.shape),
            'typestr': '<i2',
            'data': (pinned.data_ptr(), False),
            'version': 3,
            'strides': None,
        }


def move_embedding_to_host(embedding: nn.Embedding) -> bool:
    """Moves the weight of a frozen half-precision embedding to pinned host memory that the GPU reads directly.

    The parameter remains a CUDA tensor for its users (a lookup reads its rows over PCIe); only its memory moves.

    Returns:
        Whether the weight is on the host; False if the host has too little memory or the driver cannot map it.

    """
    weight = embedding.weight
    if not weight.is_cuda or weight.element_size() != 2 or weight.requires_grad or _is_mapped(weight):
        return _is_mapped(weight)
    if weight.numel() * 2 > free_host_bytes() // 4:
        return False
    try:
        pinned = torch.empty(weight.shape, dtype=torch.int16, pin_memory=True)
        pinned.copy_(weight.data.view(torch.int16))
        mapped = torch.as_tensor(_MappedHostMemory(pinned), device=weight.device).view(weight.dtype)
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
    """Host memory in bytes still available to this process (machine or container limit), 0 if unknown."""
    return available_bytes()


def free_bytes(device: torch.device) -> int:
    """Memory in bytes still available to this process on a device; ranks share the host's memory evenly."""
    if device.type != 'cuda':
        return free_host_bytes() // ranks.num_on_this_machine()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass
class HostOffload:
    """Offloads activations of recomputed layers to pinned host memory, asynchronously, and reloads them.

    Layers offload their tensors in order and reload them in reverse order; a reload prefetches the layer before.

    Attributes:
        stream: CUDA stream of the copies.
        device: Device of the tensors.
        depth: 1 offloads each layer's input; 2 also the hidden states between attention and MLP, so that one product
            is not recomputed; 3 also gate and up of every other layer, so that the largest product is not recomputed:
            as much as PCIe can transfer while the layer is computed.
        pinned: Host copies, by layer.
        arriving: Tensors being reloaded, by layer, with the event that marks the end of their copy.

    """

    stream: torch.cuda.Stream
    device: torch.device
    depth: int = 1
    pinned: list[list[Tensor]] = field(default_factory=list)
    arriving: dict[int, tuple[list[Tensor], torch.cuda.Event]] = field(default_factory=dict)

    def select(self, x: Tensor, middle: Tensor, gate_up: Tensor) -> list[Tensor]:
        """Selects the tensors of a layer to offload."""
        count = 2 + len(self.pinned) % 2 if self.depth > 2 else self.depth
        return [x, middle, gate_up][:count]

    def offload(self, tensors: list[Tensor]) -> int:
        """Starts copying a layer's tensors to the host; returns their index."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.pinned.append([copy_to_host(x) for x in tensors])
        for x in tensors:
            x.record_stream(self.stream)
        return len(self.pinned) - 1

    def reload(self, index: int) -> list[Tensor]:
        """Returns offloaded tensors on the GPU; prefetches the layer before."""
        if index not in self.arriving:
            self._fetch(index)
        tensors, arrived = self.arriving.pop(index)
        torch.cuda.current_stream().wait_event(arrived)
        if index:
            self._fetch(index - 1)
        return tensors

    def prefetch(self) -> None:
        """Prefetches the last offloaded layer."""
        if self.pinned and len(self.pinned) - 1 not in self.arriving:
            self._fetch(len(self.pinned) - 1)

    def _fetch(self, index: int) -> None:
        pinned = self.pinned[index]
        tensors = [torch.empty(p.shape, dtype=p.dtype, device=self.device) for p in pinned]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for x, source in zip(tensors, pinned, strict=True):
                x.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        self.arriving[index] = (tensors, arrived)


def copy_to_host(x: Tensor) -> Tensor:
    """Starts a copy to pinned memory, complete when the current stream reaches this point."""
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def sync_once_per_step(optimizer: torch.optim.Optimizer) -> bool:
    """Makes a bitsandbytes optimizer synchronize with the GPU once per step instead of after each parameter.

    Its update of 448 adapter matrices takes 4 ms on an H200; 448 synchronizations and 896 prefetches of paged state
    that is already on the GPU take 40 ms. Paged state is prefetched every 64th step, and always when memory is short;
    other pages are migrated when accessed. The instance's `step` is replaced; state, arithmetic and checkpoints do not
    change.

    Returns:
        Whether the optimizer is a bitsandbytes optimizer and was changed.

    """
    from bitsandbytes.optim.optimizer import Optimizer8bit

    if not isinstance(optimizer, Optimizer8bit):
        return False
    optimizer._fused_steps = 0  # type: ignore[attr-defined]
    optimizer.step = types.MethodType(_step, optimizer)  # type: ignore[method-assign]
    return True


@torch.no_grad()
def _step(self: Any, closure: Any = None) -> Any:
    pending = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
    if closure is not None or not self.initialized or not all(len(self.state[p]) for p in pending):
        return type(self).step(self, closure)  # initializes its state
    on_gpu = any(p.is_cuda for p in pending)
    prefetch = not on_gpu or self._fused_steps % _PREFETCH_EVERY == 0 or _memory_is_short()
    self._fused_steps += 1
    for group_index, group in enumerate(self.param_groups):
        for index, p in enumerate(group['params']):
            if p.grad is not None:
                if prefetch:
                    self.prefetch_state(p)
                self.update_step(group, p, group_index, index)
    if on_gpu:
        torch.cuda.synchronize()  # the host may read paged state next
    return None


def _memory_is_short() -> bool:
    """Whether the GPU has so little free memory that paged state may have been evicted."""
    free, total = torch.cuda.mem_get_info()
    return free < total // 10
