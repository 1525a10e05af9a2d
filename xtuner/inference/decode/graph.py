"""One token's way through a decoder as a fixed list of kernels, recorded once as a CUDA graph and replayed.

The token, its position, the cache and everything between have fixed places. Launching the kernels one by one would take
the host longer than the GPU takes to run them.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtuner.inference.decode.forward import Cache
from xtuner.inference.decode.layers import Layer
from xtuner.inference.decode.product import Product
from xtuner.kernels.quantized import QuantizedWeight
from xtuner.kernels.triton import decode_attention, gemv
from xtuner.kernels.triton.nf4_lut import to_planes

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class _Part:
    """A product as its kernel takes it; `lora_ax` receives `s A x` of its adapters."""

    weights: gemv.GemvWeights
    bias: Tensor | None
    lora: gemv.GemvLora | None
    lora_ax: Tensor | None

    @property
    def planes(self) -> int:
        """In how many planes its input lies."""
        return self.weights.planes

    def project(self, x: Tensor) -> None:
        """Writes `s A x` of the adapters, where there are any."""
        if self.lora is not None and self.lora_ax is not None:
            gemv.project(self.lora, x, self.lora_ax)

    def multiply(self, x: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Writes the product, or adds it to what is there."""
        self.project(x)
        gemv.multiply(self.weights, x, out, bias_N=self.bias, lora=self.lora, lora_ax=self.lora_ax, add=add)

    def multiply_gated(self, x: Tensor, out: Tensor, *, planes: int) -> None:
        """Writes the gated product of two layers, in planes."""
        self.project(x)
        gemv.multiply_gated(self.weights, x, out, bias_N=self.bias, lora=self.lora, lora_ax=self.lora_ax, planes=planes)


class TokenStep:
    """The forward pass of one token, with fixed places for all it reads and writes.

    Args:
        layers: The decoder's layers.
        decoder: The decoder: its embedding and its last norm are used.
        head: From hidden states to logits.
        cache: Where keys and values go.
        angles: Cosines and sines of all positions.

    Raises:
        ValueError: a product has a form that the kernels do not take.
    """

    def __init__(
        self, layers: list[Layer], decoder: Any, head: Any, cache: Cache, angles: tuple[Tensor, Tensor]
    ) -> None:
        self._layers, self._decoder, self._head, self._cache, self._angles = layers, decoder, head, cache, angles
        self._parts = [[_part(product) for product in layer.products] for layer in layers]
        heads, like = layers[0].heads, cache.all
        size = layers[0].qkv.num_in
        self.token = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.position = torch.zeros((), dtype=torch.int32, device=like.device)
        self._x = torch.empty(1, size, dtype=torch.float32, device=like.device)
        self._normed = torch.empty(size, device=like.device)
        self._last = like.new_empty(1, size)
        self._qkv = torch.empty(heads.groups, heads.queries + 2 * heads.keys, heads.size, device=like.device)
        self._query = torch.empty(heads.num_queries, heads.size, device=like.device)
        self._attended = torch.empty(heads.num_queries * heads.size, device=like.device)
        self._gated = torch.empty(layers[0].down.num_in, device=like.device)
        self._attention = decode_attention.DecodeAttention(heads.num_queries, like[0, 0])
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    def run(self) -> Tensor:
        """Enqueues one step: `token` at `position`, which then counts on. Returns logits (1, V)."""
        self._x.copy_(self._decoder.embed_tokens(self.token))
        x, position = self._x.view(-1), self.position
        for number, (layer, (qkv, out, gate_up, down)) in enumerate(zip(self._layers, self._parts, strict=True)):
            heads = layer.heads
            keys, values = self._cache.all[2 * number, 0], self._cache.all[2 * number + 1, 0]
            self._norm(layer.norm_in, self._normed, qkv.planes)
            qkv.multiply(self._normed, self._qkv)
            decode_attention.rope_and_store(
                self._qkv, self._angles, position, self._query, keys, values, queries=heads.queries
            )
            self._attention(self._query, keys, values, position, self._attended, heads.scale, planes=out.planes)
            out.multiply(self._attended, x, add=True)
            self._norm(layer.norm_mid, self._normed, gate_up.planes)
            gate_up.multiply_gated(self._normed, self._gated, planes=down.planes)
            down.multiply(self._gated, x, add=True)
        self._norm(self._decoder.norm, self._last, 1)
        self.position += 1
        return self._head(self._last)

    def _norm(self, module: Any, out: Tensor, planes: int) -> None:
        decode_attention.norm(self._x, module.weight, module.variance_epsilon, out, planes=planes)

    def record(self, free_position: int) -> None:
        """Records the step, so that `replay` is one launch; where that fails, `replay` goes on launching all.

        Args:
            free_position: Where the cache holds nothing yet: the step is run there once before.
        """
        self.position.fill_(free_position)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.run()  # compiles and loads what has not been yet, which cannot be recorded
            gc.collect()
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
                    self._logits = self.run()
                self._graph = graph
            except RuntimeError as error:
                logger.warning('decoding goes on without a recorded graph: %s', error)
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> Tensor:
        """As `run`; the logits lie in one place, to be read before the next."""
        if self._graph is None or self._logits is None:
            return self.run()
        self._graph.replay()
        return self._logits


class Mailbox:
    """Brings drawn tokens to the host while the GPU goes on."""

    def __init__(self) -> None:
        self._places = torch.empty(2, dtype=torch.int64, pin_memory=True)
        self._events = [torch.cuda.Event(), torch.cuda.Event()]
        self._number = 0

    def send(self, token_1: Tensor) -> int:
        """Starts a token's way; returns its ticket. At most two may be under way."""
        place = self._number % 2
        self._number += 1
        self._places[place : place + 1].copy_(token_1, non_blocking=True)
        self._events[place].record()
        return place

    def receive(self, ticket: int) -> int:
        """Waits for a token."""
        self._events[ticket].synchronize()
        return int(self._places[ticket])


def _part(product: Product) -> _Part:
    quantised = [layer.parts() for layer in product.layers]
    if any(part is None for part in quantised):
        weights = gemv.gemv_weights([layer.module.weight.detach() for layer in product.layers])
    else:
        weights = gemv.gemv_weights([part for part in quantised if isinstance(part, QuantizedWeight)])
    if isinstance(weights, str):
        raise ValueError(weights)
    dtype = product.dtype
    if weights.form == gemv.FLOAT and weights.dtype != dtype:
        raise ValueError(f'a layer has weights in {weights.dtype} among {dtype}')
    lora = _lora(product, weights.planes)
    lora_ax = None
    if lora is not None:
        lora_ax = torch.empty(len(lora.a), dtype=torch.float32, device=lora.a.device)
    return _Part(weights, product.bias, lora, lora_ax)


def _lora(product: Product, planes: int) -> gemv.GemvLora | None:
    """All of a product's adapters, padded with zeros to one rank; None where it has none."""
    adapters = product.adapters
    if not any(adapters):
        return None
    rank = max(1 << (adapter.rank - 1).bit_length() for adapter in adapters if adapter)
    device = product.layers[0].module.weight.device
    a = torch.zeros(len(adapters) * rank, product.num_in, dtype=product.dtype, device=device)
    b = torch.zeros(product.num_out, rank, dtype=product.dtype, device=device)
    row = 0
    for number, (layer, adapter) in enumerate(zip(product.layers, adapters, strict=True)):
        if adapter:
            a[number * rank : number * rank + adapter.rank] = adapter.a_rK.float() * adapter.scaling
            b[row : row + layer.shape[0], : adapter.rank] = adapter.b_Nr
        row += layer.shape[0]
    return gemv.GemvLora(to_planes(a, planes).contiguous(), b, rank)
