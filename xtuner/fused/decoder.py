"""A whole Llama-like decoder on the fast path: what it is made of, and its forward pass."""

from __future__ import annotations

import logging
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.fused.attention import attention_for
from xtuner.fused.context import LayerContext, LayerParts, StepContext
from xtuner.fused.cuda_graphs import (
    AFTER_BATCHES,
    MOST_TOKENS,
    GraphFunction,
    LayerGraphs,
    flatten,
    signature,
    suits,
)
from xtuner.fused.fp8 import WeightScales, product_unsupported_reason
from xtuner.fused.frozen import FrozenLinear
from xtuner.fused.layer import LayerFunction, NormFunction
from xtuner.fused.linear import ComputePolicy, Group
from xtuner.fused.offload import HostOffload, free_bytes, free_host_bytes
from xtuner.fused.projections import adapter_of, adapter_unsupported_reason, base_of
from xtuner.fused.recompute import activation_budget_bytes, gathered_bytes, num_recomputed_layers
from xtuner.fused.ulysses import SequenceGroup, SharedAttention
from xtuner.kernels.dispatch import Kernels
from xtuner.model.families.find import spec_of

_LOGGER = logging.getLogger('xtuner')


class FusedDecoder:
    """The fast forward pass of one decoder (transformers' `LlamaModel` or one like it).

    Args:
        decoder: The module; only read.
        kernels: Which kernels to use.
        fused_lora: Whether adapters become part of the big products (right on CUDA, a waste elsewhere).
        by_memory: Compute layers again only where memory is short, whatever the decoder's own setting is.
        fp8: Multiply frozen weights and adapters in FP8; adapters are part of the products then.
        sharded: Call each layer as a module, whose hooks put its weights together and take them apart again.

    """

    def __init__(
        self,
        decoder: Any,
        kernels: Kernels,
        *,
        fused_lora: bool,
        by_memory: bool = False,
        fp8: bool = False,
        sharded: bool = False,
    ) -> None:
        self.decoder: Any = decoder
        self.kernels = kernels
        self.fused_lora = fused_lora and not fp8
        self.by_memory = by_memory
        self.room: int | None = None  # for activations; known when the first batch comes
        self._reported: int | None = None
        self.graphs_allowed = True
        self.offload_from_bytes = 2**28
        self._last_form: tuple | None = None
        self._streak = 0
        self._unsuited = 0
        self._graphs: tuple[tuple, LayerGraphs] | None = None
        self._copies: Any = None
        self._pinned_bytes = 0  # PyTorch keeps what it has pinned, so it is not free but ours
        self.spec = spec_of(decoder.config)
        assert self.spec.paths is not None
        self.paths = self.spec.paths
        ends = [0, *accumulate(len(group) for group in self.paths.groups)]
        self.groups = [range(*pair) for pair in pairwise(ends)]  # numbers of the projections that are one product
        self.projections: list[list[Any]] = [self.paths.projections(layer) for layer in decoder.layers]
        self.frozen = [[FrozenLinear(base_of(p)) for p in layer] for layer in self.projections]
        self.layers = [
            self._layer_parts(layer, frozen) for layer, frozen in zip(self.decoder.layers, self.frozen, strict=True)
        ]
        self.scales = WeightScales(self.layers) if fp8 else None
        self.sharded = sharded
        self.sequence: SequenceGroup | None = None  # the ranks that share each pack
        for number, layer in enumerate(self.decoder.layers):
            if isinstance(layer.__dict__.get('forward'), ShardedForward):  # of a fast path before this one
                del layer.forward
            if sharded:
                layer.forward = ShardedForward(self, layer, number)

    def _layer_parts(self, layer: Any, frozen: list[FrozenLinear]) -> LayerParts:
        config, attention = self.decoder.config, attrgetter(self.paths.attention)(layer)
        qkv, out, gate_up, down = (Group([frozen[i] for i in group]) for group in self.groups)
        norm_in, norm_mid = (attrgetter(path)(layer) for path in self.paths.norms)
        return LayerParts(
            qkv, out, gate_up, down, norm_in, norm_mid, config.num_attention_heads, config.num_key_value_heads,
            attention.head_dim, attention.scaling, self.spec.qkv_by_key_head,
        )  # fmt: skip

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """The last hidden states, (B, S, H), differentiable by the adapters.

        Args:
            input_ids: int64 (B, S).
            position_ids: int64 (B, S), best on the host; a sample begins wherever they do not go on by one. None:
                each row is one. Where ranks share packs, those of the whole rows.

        """
        decoder, (rows, length) = self.decoder, input_ids.shape
        hidden = decoder.embed_tokens(input_ids) if _trained(decoder.embed_tokens) else self._embed(input_ids)
        x = hidden.reshape(rows * length, -1)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if position_ids is None:
            position_ids = torch.arange(length, device=x.device)[None]
        size, sequence = self.layers[0].head_size, self.sequence
        whole = length if sequence is None else length * sequence.size
        attention: Any = attention_for(position_ids, rows, whole, device=x.device, dtype=dtype, head_size=size)
        if sequence is not None:
            attention, position_ids = SharedAttention(attention, sequence), sequence.own(position_ids)
        cos, sin = self._angles(position_ids.to(x.device, non_blocking=True), rows, size // 2, x)
        how = ComputePolicy(self.kernels, dtype, self.fused_lora, fp8=self.scales is not None)
        batch = StepContext(how, attention, cos, sin, self._seeds(x.device), num_recomputed=0)
        pairs = [self.run_of(number, batch) for number in range(len(self.layers))]
        runs, parameters = [run for run, _ in pairs], [own for _, own in pairs]
        if self.scales is not None:
            self.scales.update(runs)
        batch.num_recomputed = self._num_recomputed(runs, x)
        batch.how.low_memory = (
            not self.by_memory and batch.num_recomputed > 0 and len(x) <= MOST_TOKENS
        )  # asked for least memory
        batch.store = self._store(batch.num_recomputed, x)
        x = self._through_layers(x, runs, parameters)
        norm = decoder.norm
        return NormFunction.apply(x, norm.weight, norm.variance_epsilon, how).view(rows, length, -1)

    def run_of(self, number: int, batch: StepContext) -> tuple[LayerContext, list[Tensor]]:
        """A layer in a batch, and its adapters' parameters as autograd shall see them."""
        flat = [adapter_of(p) for p in self.projections[number]]
        parameters = [t for a in flat if a for t in (a.a_rK, a.b_Nr)]
        for adapter in flat:
            if adapter:
                adapter.a_rK, adapter.b_Nr = adapter.a_rK.detach(), adapter.b_Nr.detach()
        return LayerContext(
            number, self.layers[number], batch, [[flat[i] for i in group] for group in self.groups]
        ), parameters

    def _through_layers(self, x: Tensor, runs: list[LayerContext], parameters: list[list[Tensor]]) -> Tensor:
        keep, batch = torch.is_grad_enabled(), runs[0].batch
        if self.sharded:
            for layer in self.decoder.layers:
                x = nn.Module.__call__(layer, x, batch)  # past what stock checkpointing does to `__call__`
            return x
        recorded = self._recorded(x, runs) if keep and not x.requires_grad else None
        if recorded is not None:
            return GraphFunction.apply(x, recorded, batch, *(p for layer in parameters for p in layer))
        for run, own in zip(runs, parameters, strict=True):
            x = LayerFunction.apply(x, run, keep, *own)
        return x

    def _recorded(self, x: Tensor, runs: list[LayerContext]) -> LayerGraphs | None:
        """Recorded graphs for this form of batch, recorded now if it is the fourth in a row; None: the ordinary way."""
        if not self.graphs_allowed or not suits(runs, len(x)):
            self._unsuited += 1
            if self._unsuited > AFTER_BATCHES:  # other batches have come to stay: they may need the memory
                self._graphs = None
            return None
        self._unsuited = 0
        batch = runs[0].batch
        form = (x.shape, x.dtype, batch.attention.form, batch.how.dtype, batch.num_recomputed > 0)
        self._streak = self._streak + 1 if form == self._last_form else 1
        self._last_form = form
        now = (form, signature(runs))
        if self._graphs is None or self._graphs[0] != now:
            if self._streak <= AFTER_BATCHES:  # forms that come and go are not worth a recording
                return None
            self._graphs = None  # lets go of the memory before more is taken
            try:
                self._graphs = (now, LayerGraphs(runs, x))
            except RuntimeError as error:  # out of memory, or something here cannot be recorded
                self.graphs_allowed = False
                _LOGGER.warning('no CUDA graphs, training goes on without: %s', error)
                torch.cuda.empty_cache()
                return None
        graphs = self._graphs[1]
        return graphs if graphs.free else None

    def _seeds(self, device: torch.device) -> Tensor:
        """Of this batch's dropout masks, int64 (L, 4, 16): drawn from the CPU's stream, which each step sets anew."""
        drawn = torch.randint(2**31 - 64, (len(self.layers), 1)) + torch.arange(64)
        return drawn.view(-1, 4, 16).to(device, non_blocking=True)

    def _num_recomputed(self, runs: list[LayerContext], x: Tensor) -> int:
        """How many layers keep only their input: by the memory there is, or as the decoder is set."""
        if not self.by_memory:
            return len(runs) - 1 if self._checkpointing() else 0
        if self.room is None:
            parameters = (p for run in runs for a in flatten(run) for p in (a.a_rK, a.b_Nr))
            trained = sum(getattr(p, '_local_tensor', p).numel() for p in parameters)  # of a sharded one, what is here
            free = free_bytes(x.device)
            if self.sharded:
                free -= gathered_bytes(self.decoder.layers[0].parameters(), self.decoder.embed_tokens.weight)
            self.room = activation_budget_bytes(free, trained, x.device.type)
            if self.sequence is not None:  # computing again sends messages again: all must do it alike
                self.room = self.sequence.least(self.room, x.device)
        ranks = [sum(a.rank for a in group if a) for group in runs[0].adapters]
        num_recomputed = num_recomputed_layers(
            runs[0].parts, ranks, len(runs), tokens=len(x), item_bytes=runs[0].batch.how.dtype.itemsize, room=self.room
        )
        if self._reported is None or num_recomputed > self._reported:
            self._reported = num_recomputed
            _LOGGER.info(
                'room for %.1f GiB of activations: at %d tokens %d of %d layers are computed twice',
                self.room / 2**30, len(x), num_recomputed, len(runs),
            )  # fmt: skip
        return num_recomputed

    def _store(self, num_recomputed: int, x: Tensor) -> HostOffload | None:
        """Where checkpoints go: to the host if they are large and it has room."""
        inputs = x.numel() * x.element_size() * num_recomputed
        room = free_host_bytes() // 2
        if (
            not num_recomputed
            or not x.is_cuda
            or inputs < self.offload_from_bytes
            or inputs * 2 > room + self._pinned_bytes
        ):
            return None
        if self._copies is None:
            self._copies = torch.cuda.Stream()
        share = 2 + self.layers[0].down.num_in / x.shape[1]  # of all three, in units of the inputs
        deep = len(x) > MOST_TOKENS and inputs * share * 2 < room + self._pinned_bytes
        self._pinned_bytes = max(self._pinned_bytes, int(inputs * (share if deep else 1)))
        return HostOffload(self._copies, x.device, 3 if deep else 1)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Looked up without the hooks that stock checkpointing needs to make frozen embeddings differentiable."""
        with torch.no_grad():
            return functional.embedding(input_ids, self.decoder.embed_tokens.weight)

    def _angles(self, position_ids: Tensor, rows: int, half: int, like: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        carrier = torch.empty(0, dtype=wide, device=like.device)
        with torch.autocast(like.device.type, enabled=False):
            cos, sin = self.decoder.rotary_emb(carrier, position_ids=position_ids)
        expanded = (t[..., :half].expand(rows, -1, -1).reshape(-1, half).contiguous() for t in (cos, sin))
        return next(expanded), next(expanded)

    def _checkpointing(self) -> bool:
        return bool(getattr(self.decoder.layers[0], 'gradient_checkpointing', False))

    def unsupported_reason(self) -> str | None:
        """Why the next batch cannot take the fast path, in a few words; None where it can."""
        for projections in self.projections:
            for projection in projections:
                reason = adapter_unsupported_reason(projection)
                if reason:
                    return reason
        return None

    def keep_weights(self, dtype: torch.dtype, budget_bytes: int) -> int:
        """Turns 4-bit weights into floats once and for all, as many as fit; returns how many.

        Meant for CPUs, where turning them anew costs more than the memory.
        """
        kept, size = 0, torch.finfo(dtype).bits // 8
        for group in (group for layer in self.layers for group in layer.groups):
            need = group.num_in * group.num_out * size
            if group.is_4bit and need <= budget_bytes:
                group.keep(dtype)
                budget_bytes -= need
                kept += len(group.layers)
        return kept


class ShardedForward:
    """Stands in for one layer's `forward`, between the hooks that put its weights together and take them apart."""

    def __init__(self, fast: FusedDecoder, layer: Any, number: int) -> None:
        self._fast, self._layer, self._number = fast, layer, number

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer in a fast batch, or its own forward pass for whatever else it is called with."""
        if not (args and isinstance(args[0], StepContext)):
            return type(self._layer).forward(self._layer, x, *args, **kwargs)
        run, parameters = self._fast.run_of(self._number, args[0])
        return LayerFunction.apply(x, run, torch.is_grad_enabled(), *parameters)


def fp8_unsupported_reason(fast: FusedDecoder) -> str | None:
    """Why a decoder's products cannot be in FP8, in a few words; None where they can."""
    adapters = [[adapter_of(p) for p in projections] for projections in fast.projections]
    ranks = [sum(a.rank for a in (layer[i] for i in group) if a) for layer in adapters for group in fast.groups]
    return product_unsupported_reason(fast.layers, ranks, next(fast.decoder.layers[0].parameters()).device)


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
