"""Host memory beside the GPU: embeddings looked up from it, checkpoints kept in it, an optimizer that waits once."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xtuner import ranks
from xtuner.utils.host_memory import available_bytes

_PREFETCH_EVERY = 64


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
    """Memory in bytes that this process may still take from its machine or container, 0 where it cannot be known."""
    return available_bytes()


def free_bytes(device: torch.device) -> int:
    """Memory in bytes that this process could still take where tensors of a device lie; ranks share a host evenly."""
    if device.type != 'cuda':
        return free_host_bytes() // ranks.num_on_this_machine()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


@dataclass
class HostOffload:
    """What checkpointed layers keep, copied to pinned memory while the GPU goes on, and back in time.

    Layers put their tensors in order and take them back in reverse; taking one's starts the copy of the one's before.

    Attributes:
        stream: The copies' own stream.
        device: Where the tensors belong.
        depth: 1 keeps each layer's input; 2 also the state between its halves, which spares a product; 3 also gate and
            up of every other layer, which spares the largest: as much as the bus carries while the layer is computed.

    """

    stream: torch.cuda.Stream
    device: torch.device
    depth: int = 1
    kept: list[list[Tensor]] = field(default_factory=list)
    coming: dict[int, tuple[list[Tensor], torch.cuda.Event]] = field(default_factory=dict)

    def select(self, x: Tensor, middle: Tensor, gate_up: Tensor) -> list[Tensor]:
        """Which of a layer's tensors go to the host."""
        wanted = 2 + len(self.kept) % 2 if self.depth > 2 else self.depth
        return [x, middle, gate_up][:wanted]

    def offload(self, tensors: list[Tensor]) -> int:
        """Starts the copies to the host; returns the place."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.kept.append([copy_to_host(x) for x in tensors])
        for x in tensors:
            x.record_stream(self.stream)
        return len(self.kept) - 1

    def reload(self, place: int) -> list[Tensor]:
        """The tensors of a place, on the GPU; starts the copies of the place before."""
        if place not in self.coming:
            self._fetch(place)
        tensors, arrived = self.coming.pop(place)
        torch.cuda.current_stream().wait_event(arrived)
        if place:
            self._fetch(place - 1)
        return tensors

    def prefetch(self) -> None:
        """Starts the copies of the last place."""
        if self.kept and len(self.kept) - 1 not in self.coming:
            self._fetch(len(self.kept) - 1)

    def _fetch(self, place: int) -> None:
        pinned = self.kept[place]
        tensors = [torch.empty(p.shape, dtype=p.dtype, device=self.device) for p in pinned]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for x, source in zip(tensors, pinned, strict=True):
                x.copy_(source, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        self.coming[place] = (tensors, arrived)


def copy_to_host(x: Tensor) -> Tensor:
    """A copy in pinned memory, on its way: complete when the current stream has come this far."""
    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return pinned.copy_(x, non_blocking=True)


def wait_once_a_step(optimizer: torch.optim.Optimizer) -> bool:
    """Makes a bitsandbytes optimizer wait for the GPU after a step instead of after each parameter.

    Its update of 448 adapter matrices takes 4 ms on an H200; 448 waits, and 896 requests to bring in state that is
    there already, take 40 ms. State is asked for every 64th step, and always when memory is short; a page that is not
    there is brought in when touched. The instance's `step` is replaced; state, arithmetic, what is saved stay the same.

    Returns:
        Whether it was done: False for other optimizers.

    """
    from bitsandbytes.optim.optimizer import Optimizer8bit

    if not isinstance(optimizer, Optimizer8bit):
        return False
    optimizer._steps_waited_once = 0  # type: ignore[attr-defined]
    optimizer.step = types.MethodType(_step, optimizer)  # type: ignore[method-assign]
    return True


@torch.no_grad()
def _step(self: Any, closure: Any = None) -> Any:
    pending = [p for group in self.param_groups for p in group['params'] if p.grad is not None]
    if closure is not None or not self.initialized or not all(len(self.state[p]) for p in pending):
        return type(self).step(self, closure)  # its own way of setting up
    on_gpu = any(p.is_cuda for p in pending)
    prefetch = not on_gpu or self._steps_waited_once % _PREFETCH_EVERY == 0 or _memory_is_short()
    self._steps_waited_once += 1
    for group_index, group in enumerate(self.param_groups):
        for index, p in enumerate(group['params']):
            if p.grad is not None:
                if prefetch:
                    self.prefetch_state(p)
                self.update_step(group, p, group_index, index)
    if on_gpu:
        torch.cuda.synchronize()  # paged state may be read by the host next
    return None


def _memory_is_short() -> bool:
    """Whether the GPU has so little memory left that paged state may have been moved out."""
    free, total = torch.cuda.mem_get_info()
    return free < total // 10
