"""The decode step of one token as a fixed sequence of kernels, recorded once as a CUDA graph and replayed.

Token, position, KV cache and activations have static addresses. Launching the kernels one by one would take the host
longer than the GPU takes to run them.
"""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtuner.inference.decode.forward import KVCache
from xtuner.inference.decode.layers import Layer
from xtuner.inference.decode.product import Product
from xtuner.kernels.quantized import QuantizedWeight
from xtuner.kernels.triton import decode_attention, gemv
from xtuner.kernels.triton.nf4_lut import to_planes

logger = logging.getLogger('xtuner')


@dataclass(frozen=True)
class _GemvProduct:
    """A product in the layout of its kernel; `lora_ax` is the buffer for `s A x` of its adapters."""

    weights: gemv.GemvWeights
    bias: Tensor | None
    lora: gemv.GemvLora | None
    lora_ax: Tensor | None

    @property
    def planes(self) -> int:
        """Number of planes of its input."""
        return self.weights.planes

    def project(self, x: Tensor) -> None:
        """Computes `s A x` of the adapters, if any."""
        if self.lora is not None and self.lora_ax is not None:
            gemv.project(self.lora, x, self.lora_ax)

    def multiply(self, x: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Writes the product to `out`, or adds it with `add`."""
        self.project(x)
        gemv.multiply(self.weights, x, out, bias_N=self.bias, lora=self.lora, lora_ax=self.lora_ax, add=add)

    def multiply_gated(self, x: Tensor, out: Tensor, *, planes: int) -> None:
        """Writes the gated product of two layers (gate and up), split into planes."""
        self.project(x)
        gemv.multiply_gated(self.weights, x, out, bias_N=self.bias, lora=self.lora, lora_ax=self.lora_ax, planes=planes)


class DecodeStep:
    """The forward pass of one token, with static buffers.

    Args:
        layers: The decoder's layers.
        decoder: The decoder, for its embedding and its last norm.
        head: The output head.
        cache: The KV cache.
        angles: Cosines and sines of all positions.

    Raises:
        ValueError: the kernels do not support a product.
    """

    def __init__(
        self, layers: list[Layer], decoder: Any, head: Any, cache: KVCache, angles: tuple[Tensor, Tensor]
    ) -> None:
        self._layers, self._decoder, self._head, self._cache, self._angles = layers, decoder, head, cache, angles
        self._parts = [[_gemv_product(product) for product in layer.products] for layer in layers]
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
        """Launches one step for `token` at `position` and increments `position`. Returns logits (1, V)."""
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
        """Records the step as a CUDA graph; if that fails, `replay` launches the kernels one by one.

        Args:
            free_position: An unused position of the cache, at which the step is run once before recording.
        """
        self.position.fill_(free_position)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self.run()  # compiles and loads kernels, which cannot be recorded
            gc.collect()
            torch.cuda.synchronize()
            try:
                with torch.cuda.graph(graph, stream=stream, capture_error_mode='thread_local'):
                    self._logits = self.run()
                self._graph = graph
            except RuntimeError as error:
                logger.warning('CUDA graphs disabled for decoding (slower): %s', error)
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self) -> Tensor:
        """Same as `run`; the logits are valid until the next call."""
        if self._graph is None or self._logits is None:
            return self.run()
        self._graph.replay()
        return self._logits


class AsyncTokenReader:
    """Copies generated tokens to the host asynchronously."""

    def __init__(self) -> None:
        self._pinned = torch.empty(2, dtype=torch.int64, pin_memory=True)
        self._events = [torch.cuda.Event(), torch.cuda.Event()]
        self._count = 0

    def enqueue(self, token_1: Tensor) -> int:
        """Starts copying a token; returns its index for `wait`. At most two copies may be pending."""
        index = self._count % 2
        self._count += 1
        self._pinned[index : index + 1].copy_(token_1, non_blocking=True)
        self._events[index].record()
        return index

    def wait(self, index: int) -> int:
        """Waits for the copy of a token and returns it."""
        self._events[index].synchronize()
        return int(self._pinned[index])


def _gemv_product(product: Product) -> _GemvProduct:
    quantised = [layer.quantized() for layer in product.layers]
    if any(part is None for part in quantised):
        weights = gemv.gemv_weights([layer.module.weight.detach() for layer in product.layers])
    else:
        weights = gemv.gemv_weights([part for part in quantised if isinstance(part, QuantizedWeight)])
    if isinstance(weights, str):
        raise ValueError(weights)
    dtype = product.dtype
    if weights.form == gemv.FLOAT and weights.dtype != dtype:
        raise ValueError(f'a layer has {weights.dtype} weights in a {dtype} model')
    lora = _lora(product, weights.planes)
    lora_ax = None
    if lora is not None:
        lora_ax = torch.empty(len(lora.a), dtype=torch.float32, device=lora.a.device)
    return _GemvProduct(weights, product.bias, lora, lora_ax)


def _lora(product: Product, planes: int) -> gemv.GemvLora | None:
    """All adapters of a product, zero-padded to the same rank; None if it has none."""
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
