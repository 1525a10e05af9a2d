"""CUDA graphs of the layers, for batches so small that the CPU cannot launch kernels as fast as the GPU runs them.

Two graphs a layer, forward and backward, recorded once for a form of batch and replayed in order. Activations have
fixed places, so one forward pass must see its backward pass (or be forgotten) before the next is replayed; the decoder
takes the ordinary way otherwise.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xtuner.fused.context import LayerContext, StepContext
from xtuner.fused.layer import layer_backward, layer_forward, recompute_layer

MOST_TOKENS = 4096  # beyond, the GPU is the slower one: at 8192 graphs changed nothing on an H200
AFTER_BATCHES = 3
_AHEAD = 3  # places for inputs on their way to the host


class LayerGraphs:
    """Recorded graphs of all layers for one form of batch.

    Args:
        runs: One a layer; parameters and weights keep their places in memory.
        like_TH: An input of the first layer: size, dtype, device.

    """

    def __init__(self, runs: list[LayerContext], like_TH: Tensor) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._owner: weakref.ref | None = None
        batch = runs[0].batch
        self.cos, self.sin, self.seeds = batch.cos.clone(), batch.sin.clone(), batch.seeds.clone()
        self.attention = batch.attention.fixed()
        # If layers are computed again, all are: their inputs take turns in a few places on their way to the host.
        # Otherwise every layer's input has a place.
        self.ring = batch.num_recomputed > 0
        num_recomputed = len(runs) if self.ring else 0
        fixed = StepContext(batch.how, self.attention, self.cos, self.sin, self.seeds, num_recomputed)
        self.runs = [LayerContext(r.number, r.parts, fixed, r.adapters) for r in runs]
        self.inputs = [torch.empty_like(like_TH) for _ in range(_AHEAD if self.ring else 1)]
        self.returned = [torch.empty_like(like_TH) for _ in range(2 if self.ring else 0)]
        self.host = [torch.empty(like_TH.shape, dtype=like_TH.dtype, pin_memory=True) for _ in runs if self.ring]
        self._copies = torch.cuda.Stream()
        self.gradient = torch.empty_like(like_TH)
        shapes = [[t.shape for a in flatten(r) for t in (a.a_rK, a.b_Nr)] for r in runs]
        self.shapes = shapes
        self.flat = torch.empty(max(sum(s.numel() for s in each) for each in shapes), device=like_TH.device)
        self._forward: list[torch.cuda.CUDAGraph] = []
        self._backward: list[torch.cuda.CUDAGraph] = []
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()  # what batches took so far the graphs' own memory replaces
        self._record_all()

    def _record_all(self) -> None:
        kept: list[Any] = []
        for number in range(len(self.runs)):
            self._forward.append(self._record(partial(self._one_forward, number, kept)))
        for number in reversed(range(len(self.runs))):
            self._backward.append(self._record(partial(self._one_backward, number, kept)))

    def _one_forward(self, number: int, kept: list[Any]) -> None:
        run = self.runs[number]
        if self.ring:
            out, _ = layer_forward(run, self.inputs[number % _AHEAD], differentiable=False)
            self.inputs[(number + 1) % _AHEAD].copy_(out)
            kept.append(None)
            return
        out, held = layer_forward(run, self.inputs[-1], differentiable=True)
        self.inputs.append(out)
        kept.append(held)

    def _one_backward(self, number: int, all_kept: list[Any]) -> None:
        run, kept = self.runs[number], all_kept.pop()
        x = self.returned[number % 2] if self.ring else self.inputs[number]
        if kept is None:
            kept = recompute_layer(run, x, None, None)
        dx, grads = layer_backward(run, x, self.gradient, kept, need_dx=number > 0)
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
        """Whether no forward pass waits for its backward pass."""
        return self._owner is None or self._owner() is None

    def claim(self, owner: object) -> None:
        """Reserves the activations until `owner` is gone or lets go."""
        self._owner = weakref.ref(owner)

    def let_go(self) -> None:
        """The backward pass is done."""
        self._owner = None

    def replay_forward(self, x_TH: Tensor, batch: StepContext) -> Tensor:
        """The last layer's output, in its fixed place."""
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
                self.host[number].copy_(self.inputs[number % _AHEAD], non_blocking=True)
                sent.append(self._copies.record_event())
            if number + 1 >= _AHEAD:  # this layer's output takes the place of an input that must have left
                current.wait_event(sent[number + 1 - _AHEAD])
            graph.replay()
        return self.inputs[len(self.runs) % _AHEAD]

    def replay_backward(self, dout_TH: Tensor) -> list[Tensor]:
        """The adapters' gradients, layer by layer, in memory of their own."""
        self.gradient.copy_(dout_TH)
        found: list[list[Tensor]] = []
        last = len(self.runs) - 1
        coming = self._bring_back(last) if self.ring else None
        for behind, (graph, shapes) in enumerate(zip(self._backward, reversed(self.shapes), strict=True)):
            if coming is not None:
                torch.cuda.current_stream().wait_event(coming)
                coming = self._bring_back(last - behind - 1) if behind < last else None
            graph.replay()
            sizes = [s.numel() for s in shapes]
            parts = self.flat[: sum(sizes)].clone().split(sizes)
            found.append([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
        return [g for layer in reversed(found) for g in layer]

    def _bring_back(self, number: int) -> torch.cuda.Event:
        """Starts the copy of a layer's input to its place; two layers take turns."""
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            self.returned[number % 2].copy_(self.host[number], non_blocking=True)
            return self._copies.record_event()


class _Owner:
    """Exists as long as autograd may still ask for the backward pass."""


class GraphFunction(torch.autograd.Function):
    """`apply(x, graphs, batch, *all adapters' parameters)`: all layers at once."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, graphs: LayerGraphs, batch: StepContext, *parameters: Tensor) -> Tensor:
        """Replays the forward graphs."""
        ctx.graphs, ctx.owner = graphs, _Owner()
        graphs.claim(ctx.owner)
        return graphs.replay_forward(x_TH, batch).view(x_TH.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Any, ...]:
        """Replays the backward graphs."""
        graphs, ctx.graphs = ctx.graphs, None
        if graphs is None:
            raise RuntimeError('the fast path keeps no graph for a second backward pass')
        grads = graphs.replay_backward(dout_TH)
        graphs.let_go()
        return None, None, None, *grads


def flatten(run: LayerContext) -> list[Any]:
    """A layer's adapters in the order of its projections."""
    return [a for group in run.adapters for a in group if a]


def suits(runs: list[LayerContext], tokens: int) -> bool:
    """Whether batches like this may be recorded: small, float32 adapters."""
    batch, adapters = runs[0].batch, [a for run in runs for a in flatten(run)]
    plain = all(a.a_rK.dtype == a.b_Nr.dtype == torch.float32 for a in adapters)
    fused = batch.how.fused_lora or batch.how.fp8
    return tokens <= MOST_TOKENS and batch.attention.form is not None and fused and plain and bool(adapters)


def signature(runs: list[LayerContext]) -> tuple:
    """What must not change while recorded graphs are used: addresses of all that they read, scalings, dropout."""
    adapters = [a for run in runs for a in flatten(run)]
    own = tuple(v for a in adapters for v in (a.a_rK.data_ptr(), a.b_Nr.data_ptr(), a.scaling, a.dropout))
    layers = (layer.module for run in runs for group in run.parts.groups for layer in group.layers)
    norms = (norm for run in runs for norm in (run.parts.norm_in, run.parts.norm_mid))
    frozen = (p for module in (*layers, *norms) for p in (module.weight, getattr(module, 'bias', None)))
    return own + tuple(0 if p is None else p.data_ptr() for p in frozen)
