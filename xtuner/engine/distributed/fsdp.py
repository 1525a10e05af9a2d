"""Weights, gradients and optimizer sharded over the ranks (FSDP); a layer is gathered just before it is computed.

Uses torch's `fully_shard` on every decoder layer. The optimizer works on each rank's rows as plain tensors, so that any
element-wise optimizer can be used, including bitsandbytes'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from xtuner.adapters.attach import trainable_parameters
from xtuner.engine.distributed.base import Strategy, leaves, nested
from xtuner.engine.distributed.shards import (
    attach_rows,
    detach_rows,
    keep_quantization_states,
    read_scales_from_parameters,
)
from xtuner.model.families.find import layers_of


class FullyShard(Strategy):
    """`fully_shard` on decoder layers, the head, and the rest."""

    name = 'fsdp'
    together = True

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(rank, world_size)
        self._local: dict[str, nn.Parameter] = {}
        self._layers: set[nn.Module] = set()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Shards in place, layer by layer."""
        outer: Any = model
        base = outer.llm.get_base_model() if hasattr(outer.llm, 'get_base_model') else outer.llm
        decoder, head = base.get_decoder(), base.get_output_embeddings()
        embedding, layers = base.get_input_embeddings(), layers_of(decoder)
        device = next(layers[0].parameters()).device
        mesh = init_device_mesh(device.type, (self.world_size,))
        keep_quantization_states(decoder)
        rows = detach_rows(outer)
        self._layers = set(layers)
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        # A frozen head is gathered only for the loss; a trained one stays with the root.
        if head.weight is not embedding.weight and not _trained(head):
            fully_shard(head, mesh=mesh)
        ignored = set() if _trained(embedding) else set(embedding.parameters())
        fully_shard(outer, mesh=mesh, reshard_after_forward=False, ignored_params=ignored)
        attach_rows(rows)
        for module in _sharded(outer):  # reduce by sum, not by mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        # Initialize now that everything is in place: a sample may be generated before the first step, and the first
        # module called would otherwise be treated as the root.
        outer._get_fsdp_state()._lazy_init()
        for module in _sharded(outer):  # makes the full tensors ordinary ones, which generation alone would not do
            module.unshard()
            if module in self._layers:
                read_scales_from_parameters(module)
            module.reshard()
        self._local = {name: _local(p) for name, p in trainable_parameters(outer).items()}
        return outer

    def parameters(self) -> list[nn.Parameter]:
        """This rank's rows of each trained parameter; omits parameters without rows on this rank."""
        return [p for p in self._local.values() if p.numel()]

    def clip(self, scaler: torch.amp.GradScaler, max_norm: float) -> float:
        """Passes each gradient's rows to the optimizer's parameters, and clips by the norm over all ranks."""
        for name, parameter in trainable_parameters(self.bare).items():
            grad: Any = parameter.grad
            self._local[name].grad = None if grad is None else grad.to_local()
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        squares = torch.zeros((), dtype=torch.float64, device=next(iter(self._local.values())).device)
        if grads:
            squares = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        distributed.all_reduce(squares)
        norm = squares.sqrt().item()
        factor = max_norm / (norm + 1e-6) if math.isfinite(norm) else 1.0
        if factor < 1:
            torch._foreach_mul_(grads, factor)
        return norm

    def forget(self) -> None:
        """Drops gradients, of full parameters and of this rank's rows."""
        for parameter in [*trainable_parameters(self.bare).values(), *self._local.values()]:
            parameter.grad = None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers everything outside the layers; layers are gathered and released by themselves."""
        roots = [module for module in _sharded(self.bare) if module not in self._layers]
        for module in roots:
            module.unshard()
        try:
            yield
        finally:
            for module in roots:
                module.reshard()

    def weights(self) -> dict[str, Tensor]:
        """Gathers trained tensors one by one and keeps them on rank 0 only."""
        self._reshard()
        tensors = {}
        prefix = 'llm.'
        for name, parameter in trainable_parameters(self.bare).items():
            full = parameter.full_tensor()  # type: ignore[attr-defined]
            if self.rank == 0:
                tensors[name.removeprefix(prefix)] = full.detach().cpu()
        return tensors

    def optimizer_state(self) -> dict[str, Any]:
        """Gathers all ranks' rows; parameters are numbered as in a single process."""
        self._reshard()
        local_state = self.optimizer.state_dict()
        names = list(self._local)
        present = [name for name in names if self._local[name].numel()]
        entries = local_state['state']
        held = {name: leaves(entries[number]) for number, name in enumerate(present) if number in entries}
        # Rank 0 has rows of every parameter, so it knows what to gather.
        forms = [
            {name: {path: _is_like(v, self._local[name]) for path, v in state.items()} for name, state in held.items()}
        ]
        distributed.broadcast_object_list(forms, src=0)
        state = {}
        for number, name in enumerate(names):
            whole = {}
            for path, sharded in forms[0].get(name, {}).items():
                value = held.get(name, {}).get(path)
                whole[path] = self._gather(name, value) if sharded else value
            if whole:
                state[number] = nested(whole)
        groups = [group | {'params': list(range(len(names)))} for group in local_state['param_groups']]
        return local_state | {'state': state, 'param_groups': groups}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads this rank's rows."""
        entries: dict[int, Any] = {}
        index = 0
        for number, (name, local) in enumerate(self._local.items()):
            if not local.numel():
                continue
            if number in state['state']:
                whole = self.bare.get_parameter(name)
                saved = leaves(state['state'][number])
                entries[index] = nested({path: self._rows(value, whole) for path, value in saved.items()})
            index += 1
        groups = [group | {'params': list(range(index))} for group in state['param_groups']]
        self.optimizer.load_state_dict(state | {'state': entries, 'param_groups': groups})

    def _rows(self, value: Any, whole: Any) -> Any:
        if not _is_like(value, whole):
            return value
        chunks = value.chunk(self.world_size)
        return chunks[self.rank].clone() if self.rank < len(chunks) else value[:0]

    def _gather(self, name: str, value: Tensor | None) -> Tensor:
        whole: Any = self.bare.get_parameter(name)
        local = self._local[name]
        rows = torch.zeros_like(local) if value is None else value.to(local.device)
        full = DTensor.from_local(
            rows, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
        ).full_tensor()
        return full.cpu() if self.rank == 0 else full[:0]

    def _reshard(self) -> None:
        """Reshards every module, so that parameters are sharded ones."""
        for module in _sharded(self.bare):
            module.reshard()


def _local(parameter: Any) -> nn.Parameter:
    """A rank's rows as a parameter that shares their memory."""
    return nn.Parameter(parameter.detach().to_local())


def _is_like(value: Any, parameter: Tensor) -> bool:
    """Whether a value of the optimizer's state has one element for each of a parameter's."""
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _sharded(model: nn.Module) -> list[Any]:
    """The modules to which `fully_shard` was applied."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]
