"""The fused forward pass of a Llama-like decoder."""

from __future__ import annotations

from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.fused.attention import attention_for
from xtuner.fused.context import LayerContext, LayerParts, StepContext
from xtuner.fused.cuda_graphs import MAX_GRAPH_TOKENS, GraphCache, GraphFunction
from xtuner.fused.fp8 import WeightScales, product_unsupported_reason
from xtuner.fused.frozen import ComputePolicy, FrozenLinear
from xtuner.fused.layer import LayerFunction, NormFunction
from xtuner.fused.linear import LinearGroup
from xtuner.fused.projections import adapter_of, adapter_unsupported_reason, base_of
from xtuner.fused.recompute import ActivationMemory
from xtuner.fused.ulysses import SequenceGroup, UlyssesAttention
from xtuner.kernels.dispatch import Kernels
from xtuner.model.families.find import spec_of


class FusedDecoder:
    """The fused forward pass of one decoder (transformers' `LlamaModel` or a similar one).

    Args:
        decoder: The module; it is only read.
        kernels: The kernels to use.
        fused_lora: Whether adapters are part of the base products (faster on CUDA, slower on a CPU).
        by_memory: Recompute layers only if memory is short, whatever the decoder's checkpointing setting is.
        fp8: Multiply frozen weights and adapters in FP8; adapters are part of the products then.
        sharded: Call each layer as a module, so that the hooks of `fully_shard` gather and free its weights.

    Attributes:
        memory: Decides about recomputing and offloading.
        graphs: Recorded CUDA graphs.
        sequence: The ranks that share each pack, or None.
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
        self.memory = ActivationMemory(decoder, by_memory=by_memory, sharded=sharded)
        self.graphs = GraphCache()
        self.sequence: SequenceGroup | None = None
        self.sharded = sharded
        self.spec = spec_of(decoder.config)
        assert self.spec.paths is not None
        self.paths = self.spec.paths
        ends = [0, *accumulate(len(group) for group in self.paths.groups)]
        self.groups = [range(*pair) for pair in pairwise(ends)]  # indices of the projections that form one product
        self.projections: list[list[Any]] = [self.paths.projections(layer) for layer in decoder.layers]
        frozen = [[FrozenLinear(base_of(p)) for p in layer] for layer in self.projections]
        self.layers = [self._layer_parts(layer, own) for layer, own in zip(decoder.layers, frozen, strict=True)]
        self.scales = WeightScales(self.layers) if fp8 else None
        for number, layer in enumerate(decoder.layers):
            if isinstance(layer.__dict__.get('forward'), ShardedForward):  # of an earlier `FusedDecoder`
                del layer.forward
            if sharded:
                layer.forward = ShardedForward(self, layer, number)

    def _layer_parts(self, layer: Any, frozen: list[FrozenLinear]) -> LayerParts:
        config, attention = self.decoder.config, attrgetter(self.paths.attention)(layer)
        qkv, out, gate_up, down = (LinearGroup([frozen[i] for i in group]) for group in self.groups)
        norm_in, norm_mid = (attrgetter(path)(layer) for path in self.paths.norms)
        return LayerParts(
            qkv, out, gate_up, down, norm_in, norm_mid, config.num_attention_heads, config.num_key_value_heads,
            attention.head_dim, attention.scaling, self.spec.qkv_by_key_head,
        )  # fmt: skip

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None) -> Tensor:
        """Returns the last hidden states, (B, S, H), differentiable with respect to the adapters.

        Args:
            input_ids: int64 (B, S).
            position_ids: int64 (B, S), preferably on the host; a sample begins wherever a position is not its
                predecessor plus one. None: each row is one sample. If ranks share packs, the positions of whole rows.
        """
        decoder, (rows, length) = self.decoder, input_ids.shape
        hidden = decoder.embed_tokens(input_ids) if _is_trained(decoder.embed_tokens) else self._embed(input_ids)
        x = hidden.reshape(rows * length, -1)
        layers, parameters = self._layer_contexts(x, rows, length, position_ids)
        batch = layers[0].batch
        if self.scales is not None:
            self.scales.update(layers)
        batch.num_recomputed = self.memory.num_recomputed(layers, x, self.sequence)
        # Checkpointing that was requested, rather than chosen by memory, asks for minimum peak memory.
        batch.policy.low_memory = not self.memory.by_memory and batch.num_recomputed > 0 and len(x) <= MAX_GRAPH_TOKENS
        batch.offload = self.memory.host_offload(layers, x)
        x = self._run_layers(x, layers, parameters)
        norm = decoder.norm
        return NormFunction.apply(x, norm.weight, norm.variance_epsilon, batch.policy).view(rows, length, -1)

    def _layer_contexts(
        self, x: Tensor, rows: int, length: int, position_ids: Tensor | None
    ) -> tuple[list[LayerContext], list[list[Tensor]]]:
        """All layers in a batch, with the parameters of their adapters."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        if position_ids is None:
            position_ids = torch.arange(length, device=x.device)[None]
        size, sequence = self.layers[0].head_size, self.sequence
        whole = length if sequence is None else length * sequence.size
        attention: Any = attention_for(position_ids, rows, whole, device=x.device, dtype=dtype, head_size=size)
        if sequence is not None:
            attention, position_ids = UlyssesAttention(attention, sequence), sequence.local_slice(position_ids)
        cos, sin = self._rotary(position_ids.to(x.device, non_blocking=True), rows, size // 2, x)
        policy = ComputePolicy(self.kernels, dtype, self.fused_lora, fp8=self.scales is not None)
        batch = StepContext(policy, attention, cos, sin, self._dropout_seeds(x.device), num_recomputed=0)
        pairs = [self.layer_context(number, batch) for number in range(len(self.layers))]
        return [layer for layer, _ in pairs], [parameters for _, parameters in pairs]

    def layer_context(self, number: int, batch: StepContext) -> tuple[LayerContext, list[Tensor]]:
        """A layer in a batch, and the parameters of its adapters, for autograd."""
        flat = [adapter_of(p) for p in self.projections[number]]
        parameters = [t for a in flat if a for t in (a.a_rK, a.b_Nr)]
        for adapter in flat:
            if adapter:
                adapter.a_rK, adapter.b_Nr = adapter.a_rK.detach(), adapter.b_Nr.detach()
        adapters = [[flat[i] for i in group] for group in self.groups]
        return LayerContext(number, self.layers[number], batch, adapters), parameters

    def _run_layers(self, x: Tensor, layers: list[LayerContext], parameters: list[list[Tensor]]) -> Tensor:
        needs_backward, batch = torch.is_grad_enabled(), layers[0].batch
        if self.sharded:
            for module in self.decoder.layers:
                x = nn.Module.__call__(module, x, batch)  # bypasses `__call__` of transformers' checkpointing
            return x
        graphs = self.graphs.find(layers, x) if needs_backward and not x.requires_grad else None
        if graphs is not None:
            return GraphFunction.apply(x, graphs, batch, *(p for own in parameters for p in own))
        for layer, own in zip(layers, parameters, strict=True):
            x = LayerFunction.apply(x, layer, needs_backward, *own)
        return x

    def _dropout_seeds(self, device: torch.device) -> Tensor:
        """Seeds of this batch's dropout masks, int64 (L, 4, 16), from the CPU generator, which is seeded every step."""
        drawn = torch.randint(2**31 - 64, (len(self.layers), 1)) + torch.arange(64)
        return drawn.view(-1, 4, 16).to(device, non_blocking=True)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Looks up frozen embeddings without the hooks by which checkpointing makes their output differentiable."""
        with torch.no_grad():
            return functional.embedding(input_ids, self.decoder.embed_tokens.weight)

    def _rotary(self, position_ids: Tensor, rows: int, half: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary embedding, each (T, D / 2)."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        carrier = torch.empty(0, dtype=wide, device=like.device)
        with torch.autocast(like.device.type, enabled=False):
            cos, sin = self.decoder.rotary_emb(carrier, position_ids=position_ids)
        expanded = (t[..., :half].expand(rows, -1, -1).reshape(-1, half).contiguous() for t in (cos, sin))
        return next(expanded), next(expanded)

    def unsupported_reason(self) -> str | None:
        """Why the next batch cannot take the fused path, in a few words; None if it can."""
        for projections in self.projections:
            for projection in projections:
                reason = adapter_unsupported_reason(projection)
                if reason:
                    return reason
        return None

    def cache_dequantized(self, dtype: torch.dtype, budget_bytes: int) -> int:
        """Dequantizes as many 4-bit weights as fit into the budget, once; returns their number.

        Meant for CPUs, where dequantizing them in every step costs more than the memory.
        """
        num_cached, size = 0, torch.finfo(dtype).bits // 8
        for group in (group for layer in self.layers for group in layer.groups):
            num_bytes = group.num_in * group.num_out * size
            if group.is_4bit and num_bytes <= budget_bytes:
                group.cache_dequantized(dtype)
                budget_bytes -= num_bytes
                num_cached += len(group.layers)
        return num_cached


class ShardedForward:
    """Replaces the `forward` of one layer, between the hooks of `fully_shard` that gather and free its weights."""

    def __init__(self, fused: FusedDecoder, layer: Any, number: int) -> None:
        self._fused, self._layer, self._number = fused, layer, number

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer in a fused batch, or its own forward pass for any other arguments."""
        if not (args and isinstance(args[0], StepContext)):
            return type(self._layer).forward(self._layer, x, *args, **kwargs)
        layer, parameters = self._fused.layer_context(self._number, args[0])
        return LayerFunction.apply(x, layer, torch.is_grad_enabled(), *parameters)


def fp8_unsupported_reason(fused: FusedDecoder) -> str | None:
    """Why a decoder's products cannot be computed in FP8, in a few words; None if they can."""
    adapters = [[adapter_of(p) for p in projections] for projections in fused.projections]
    ranks = [sum(a.rank for a in (layer[i] for i in group) if a) for layer in adapters for group in fused.groups]
    return product_unsupported_reason(fused.layers, ranks, next(fused.decoder.layers[0].parameters()).device)


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
