"""CUDA graphs of the layers, for batches so small that the CPU launches kernels more slowly than the GPU runs them.

Two graphs per layer, forward and backward, are recorded once for a batch shape and replayed in order. Activations have
static addresses, so the backward pass of a forward pass must be complete (or its graph freed) before the next forward
pass is replayed; otherwise the decoder runs without graphs.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtuner.fused.context import LayerContext, StepContext
from xtuner.fused.layer import layer_backward, layer_forward, recompute_layer

MAX_GRAPH_TOKENS = 4096  # above, the GPU is the bottleneck: at 8,192 tokens graphs changed nothing on an H200
_RECORD_AFTER = 3  # consecutive batches of the same shape
_RING_SIZE = 3  # buffers for inputs that are being copied to the host
_LOGGER = logging.getLogger('xtuner')


class LayerGraphs:
    """Recorded graphs of all layers for one batch shape.

    Args:
        layers: All layers; the addresses of parameters and weights must not change.
        like_TH: An input of the first layer; gives shape, dtype and device.

    """

    def __init__(self, layers: list[LayerContext], like_TH: Tensor) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._owner: weakref.ref | None = None
        batch = layers[0].batch
        self.cos, self.sin, self.seeds = batch.cos.clone(), batch.sin.clone(), batch.seeds.clone()
        self.attention = batch.attention.with_own_offsets()
        # With recomputation, all layers are recomputed, and their inputs pass through a ring of buffers on their way to
        # the host. Otherwise every layer's input has its own buffer.
        self.ring = batch.num_recomputed > 0
        num_recomputed = len(layers) if self.ring else 0
        fixed = StepContext(batch.policy, self.attention, self.cos, self.sin, self.seeds, num_recomputed)
        self.layers = [LayerContext(r.number, r.parts, fixed, r.adapters) for r in layers]
        self.inputs = [torch.empty_like(like_TH) for _ in range(_RING_SIZE if self.ring else 1)]
        self.reloaded = [torch.empty_like(like_TH) for _ in range(2 if self.ring else 0)]
        self.host = [torch.empty(like_TH.shape, dtype=like_TH.dtype, pin_memory=True) for _ in layers if self.ring]
        self._copies = torch.cuda.Stream()
        self.gradient = torch.empty_like(like_TH)
        shapes = [[t.shape for a in adapters_in(r) for t in (a.a_rK, a.b_Nr)] for r in layers]
        self.shapes = shapes
        self.flat = torch.empty(max(sum(s.numel() for s in each) for each in shapes), device=like_TH.device)
        self._forward: list[torch.cuda.CUDAGraph] = []
        self._backward: list[torch.cuda.CUDAGraph] = []
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # the memory of earlier batches is replaced by that of the graphs
        self._record_all()

    def _record_all(self) -> None:
        all_saved: list[Any] = []
        for number in range(len(self.layers)):
            self._forward.append(self._record(partial(self._one_forward, number, all_saved)))
        for number in reversed(range(len(self.layers))):
            self._backward.append(self._record(partial(self._one_backward, number, all_saved)))

    def _one_forward(self, number: int, all_saved: list[Any]) -> None:
        layer = self.layers[number]
        if self.ring:
            out, _ = layer_forward(layer, self.inputs[number % _RING_SIZE], differentiable=False)
            self.inputs[(number + 1) % _RING_SIZE].copy_(out)
            all_saved.append(None)
            return
        out, saved = layer_forward(layer, self.inputs[-1], differentiable=True)
        self.inputs.append(out)
        all_saved.append(saved)

    def _one_backward(self, number: int, all_saved: list[Any]) -> None:
        layer, saved = self.layers[number], all_saved.pop()
        x = self.reloaded[number % 2] if self.ring else self.inputs[number]
        if saved is None:
            saved = recompute_layer(layer, x, None, None)
        dx, grads = layer_backward(layer, x, self.gradient, saved, need_dx=number > 0)
        size = sum(g.numel() for g in grads)
        torch.cat([g.reshape(-1) for g in grads], out=self.flat[:size])
        if dx is not None:
            self.gradient.copy_(dx)

    def _record(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), torch.autocast('cuda', enabled=False), torch.no_grad():
            graph.capture_begin(pool=self._pool)
            try:
                function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph

    @property
    def free(self) -> bool:
        """Whether no forward pass is waiting for its backward pass."""
        return self._owner is None or self._owner() is None

    def acquire(self, owner: object) -> None:
        """Reserves the activations until `owner` is freed or `release` is called."""
        self._owner = weakref.ref(owner)

    def release(self) -> None:
        """Frees the activations after the backward pass."""
        self._owner = None

    def replay_forward(self, x_TH: Tensor, batch: StepContext) -> Tensor:
        """Returns the last layer's output, in its static buffer."""
        self.inputs[0].copy_(x_TH)
        self.cos.copy_(batch.cos)
        self.sin.copy_(batch.sin)
        self.seeds.copy_(batch.seeds)
        if self.attention.offsets is not None and batch.attention.offsets is not None:
            self.attention.offsets.copy_(batch.attention.offsets)
        if not self.ring:
            for graph in self._forward:
                graph.replay()
            return self.inputs[-1]
        sent: list[torch.cuda.Event] = []
        current = torch.cuda.current_stream()
        for number, graph in enumerate(self._forward):
            self._copies.wait_stream(current)
            with torch.cuda.stream(self._copies):
                self.host[number].copy_(self.inputs[number % _RING_SIZE], non_blocking=True)
                sent.append(self._copies.record_event())
            if number + 1 >= _RING_SIZE:  # this layer's output overwrites an input whose copy must be complete
                current.wait_event(sent[number + 1 - _RING_SIZE])
            graph.replay()
        return self.inputs[len(self.layers) % _RING_SIZE]

    def replay_backward(self, dout_TH: Tensor) -> list[Tensor]:
        """Returns the adapters' gradients, layer by layer, in newly allocated memory."""
        self.gradient.copy_(dout_TH)
        gradients: list[list[Tensor]] = []
        last = len(self.layers) - 1
        arrived = self._reload(last) if self.ring else None
        for behind, (graph, shapes) in enumerate(zip(self._backward, reversed(self.shapes), strict=True)):
            if arrived is not None:
                torch.cuda.current_stream().wait_event(arrived)
                arrived = self._reload(last - behind - 1) if behind < last else None
            graph.replay()
            sizes = [s.numel() for s in shapes]
            parts = self.flat[: sum(sizes)].clone().split(sizes)
            gradients.append([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        return [g for layer in reversed(gradients) for g in layer]

    def _reload(self, index: int) -> torch.cuda.Event:
        """Starts copying a layer's input back from the host, into one of two buffers."""
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self.reloaded[index % 2].copy_(self.host[index], non_blocking=True)
            return self._copies.record_event()


class GraphCache:
    """CUDA graphs for the batch shape that is in use.

    Attributes:
        enabled: Whether graphs may be recorded; set to False after a failure.
        graphs: The recorded graphs with their key (shape and `signature`), or None.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.graphs: tuple[tuple, LayerGraphs] | None = None
        self._last_shape: tuple | None = None
        self._streak = 0  # consecutive batches of the same shape
        self._unsupported = 0  # consecutive batches that cannot be recorded

    def find(self, layers: list[LayerContext], x_TH: Tensor) -> LayerGraphs | None:
        """Returns the graphs for a batch, recording them at the fourth consecutive batch of the same shape.

        None: the batch must be computed without graphs.
        """
        if not self.enabled or not can_record(layers, len(x_TH)):
            self._unsupported += 1
            if self._unsupported > _RECORD_AFTER:  # the batches have changed for good and may need the memory
                self.graphs = None
            return None
        self._unsupported = 0
        batch = layers[0].batch
        shape = (x_TH.shape, x_TH.dtype, batch.attention.graph_key, batch.policy.dtype, batch.num_recomputed > 0)
        self._streak = self._streak + 1 if shape == self._last_shape else 1
        self._last_shape = shape
        key = (shape, signature(layers))
        if self.graphs is None or self.graphs[0] != key:
            if self._streak <= _RECORD_AFTER:  # recording does not pay off for shapes that change often
                return None
            self.graphs = None  # frees the memory before more is allocated
            try:
                self.graphs = (key, LayerGraphs(layers, x_TH))
            except RuntimeError as error:  # out of memory, or an operation that cannot be captured
                self.enabled = False
                _LOGGER.warning('CUDA graphs disabled for training (slower): %s', error)
                torch.cuda.empty_cache()
                return None
        graphs = self.graphs[1]
        return graphs if graphs.free else None


class _Owner:
    """Lives as long as autograd may still run the backward pass."""


class GraphFunction(torch.autograd.Function):
    """`apply(x, graphs, batch, *parameters of all adapters)`: all layers in one autograd function."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, graphs: LayerGraphs, batch: StepContext, *parameters: Tensor) -> Tensor:
        """Replays the forward graphs."""
        ctx.graphs, ctx.owner = graphs, _Owner()
        graphs.acquire(ctx.owner)
        return graphs.replay_forward(x_TH, batch).view(x_TH.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Any, ...]:
        """Replays the backward graphs."""
        graphs, ctx.graphs = ctx.graphs, None
        if graphs is None:
            raise RuntimeError(
                'the fused path does not support a second backward pass: saved activations have been freed'
            )
        grads = graphs.replay_backward(dout_TH)
        graphs.release()
        return None, None, None, *grads


def adapters_in(layer: LayerContext) -> list[Any]:
    """The adapters of a layer, in the order of its projections."""
    return [a for group in layer.adapters for a in group if a]


def can_record(layers: list[LayerContext], tokens: int) -> bool:
    """Whether a batch can be recorded: few tokens, adapters in float32."""
    batch, adapters = layers[0].batch, [a for layer in layers for a in adapters_in(layer)]
    plain = all(a.a_rK.dtype == a.b_Nr.dtype == torch.float32 for a in adapters)
    fused = batch.policy.fused_lora or batch.policy.fp8
    return tokens <= MAX_GRAPH_TOKENS and batch.attention.graph_key is not None and fused and plain and bool(adapters)


def signature(layers: list[LayerContext]) -> tuple:
    """Key under which graphs stay valid: addresses of all tensors that they read, LoRA scalings, dropout rates."""
    adapters = [a for layer in layers for a in adapters_in(layer)]
    own = tuple(v for a in adapters for v in (a.a_rK.data_ptr(), a.b_Nr.data_ptr(), a.scaling, a.dropout))
    linears = (linear.module for layer in layers for group in layer.parts.groups for linear in group.layers)
    norms = (norm for layer in layers for norm in (layer.parts.norm_in, layer.parts.norm_mid))
    frozen = (p for module in (*linears, *norms) for p in (module.weight, getattr(module, 'bias', None)))
    return own + tuple(0 if p is None else p.data_ptr() for p in frozen)
