"""Frozen linear layers with trainable LoRA adapters, one or several on the same input: forward and backward.

On CUDA a group is one matrix product: the layers' weights are dequantized into one buffer, the adapters appended to the
inner dimension, so that `[x | x A'] [W | s B]'` computes base and adapter at once, and `[dy | s dy B] [W ; A]` the
whole gradient with respect to x; with `fp8` both factors are quantized to FP8 first. Without `fused_lora` each layer is
a separate product, to which the adapter is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from xtuner.fused.frozen import ComputePolicy, Frozen, FrozenLinear, LoraWeights
from xtuner.fused.weights import (
    bias_of,
    column_factors,
    columns_of,
    concat_weight_and_b,
    lora_column_slices,
    stack_a,
    stack_weight_and_a,
    stack_weight_and_a_transposed,
)
from xtuner.kernels.cpu_gemm import add_product_, product, sum_of_products

FP8 = torch.float8_e4m3fn
_CHUNK_BYTES = 24 * 2**20  # maximum size of a dequantized chunk with `low_memory`
Adapters = Sequence[LoraWeights | None]
Chunk = tuple[Sequence[Frozen], Adapters, Sequence[slice | None]]  # layers or rows of one, adapters, LoRA columns


class LinearGroup:
    """Linear layers that read the same input. Holds no activations: they are passed as arguments."""

    def __init__(self, layers: list[FrozenLinear]) -> None:
        self.layers = layers
        self.cached: tuple[Tensor, Tensor | None] | None = None  # stacked weights and biases; see `cache_dequantized`
        self.scale = torch.ones(())  # FP8 scale of weights and adapters, set by `fp8.WeightScales`
        self.num_in = layers[0].shape[1]
        self.num_out = sum(layer.shape[0] for layer in layers)

    @property
    def is_4bit(self) -> bool:
        """Whether all weights are quantized to 4 bits."""
        return all(layer.quantized() is not None for layer in self.layers)

    def cache_dequantized(self, dtype: torch.dtype) -> None:
        """Dequantizes the weights once and keeps them, stacked."""
        self.cached = torch.cat([layer.matrix(dtype) for layer in self.layers]), bias_of(self.layers, dtype)

    def forward(
        self, policy: ComputePolicy, x_wide: Tensor, adapters: Adapters, seeds: Tensor, *, extra_columns: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Computes the group's outputs.

        Args:
            policy: How products are computed.
            x_wide: (T, K + R): the input, followed by R columns that this call fills; (T, K) unless `fused_lora`.
            adapters: One per layer, or None.
            seeds: int64 (n,), seeds of the dropout masks, one per layer.
            extra_columns: Columns to leave free to the right of the output, for use in the backward pass.

        Returns:
            The output, (T, N + spare), and `s x A'`, (T, R), which the adapters' gradients need.
        """
        x = x_wide[:, : self.num_in]
        projected = self._project(policy, x_wide, x, adapters, seeds)
        if policy.fused_lora:
            out = torch.empty(len(x), self.num_out + extra_columns, dtype=policy.dtype, device=x.device)
            self._fused_lora_product(policy, x_wide, adapters, out[:, : self.num_out])
        elif policy.fp8:
            out = self._fp8_product(policy, x, projected, adapters)
        else:
            out = self._separate_products(policy, x)
        scaled = torch.empty(0, device=x.device)
        if projected is not None:
            scaled = projected * column_factors(adapters, projected)
            for adapter, columns, rows in self._adapter_slices(adapters) if policy.separate_lora else ():
                add_product_(out[:, rows], scaled[:, columns], adapter.b_Nr.to(policy.dtype).t())
        return out, scaled

    def scaled_projection(self, policy: ComputePolicy, x: Tensor, adapters: Adapters, seeds: Tensor) -> Tensor:
        """Only `s x A'`, (T, R), the second result of `forward`."""
        if not any(adapters):
            return torch.empty(0, device=x.device)
        separate = ComputePolicy(policy.kernels, policy.dtype, fused_lora=False)
        projected = self._project(separate, x, x, adapters, seeds)
        assert projected is not None
        return projected * column_factors(adapters, projected)

    def _project(
        self, policy: ComputePolicy, x_wide: Tensor, x: Tensor, adapters: Adapters, seeds: Tensor
    ) -> Tensor | None:
        """`x A'` of all adapters, (T, R), concatenated; in the last columns of `x_wide` if `fused_lora`."""
        ranks = sum(a.rank for a in adapters if a)
        if not ranks:
            return None
        out = (
            x_wide[:, self.num_in :]
            if policy.fused_lora
            else torch.empty(len(x), ranks, dtype=policy.dtype, device=x.device)
        )
        if not any(a and a.dropout for a in adapters):
            return product(x, stack_a(adapters, policy.dtype).t(), out=out)
        for number, (adapter, columns) in enumerate(columns_of(adapters)):
            weight = adapter.a_rK.to(policy.dtype)
            if adapter.dropout:
                policy.kernels.dropout_project(x, weight, adapter.dropout, seeds[number], out[:, columns])
            else:
                product(x, weight.t(), out=out[:, columns])
        return out

    def _fused_lora_product(self, policy: ComputePolicy, x_wide: Tensor, adapters: Adapters, y: Tensor) -> None:
        row, ranks = 0, x_wide.shape[1] - self.num_in
        for layers, own, lora_columns in self._chunks(policy, adapters):
            weight = concat_weight_and_b(layers, own, lora_columns, ranks, policy.kernels, policy.dtype)
            bias, out = bias_of(layers, policy.dtype), y[:, row : row + len(weight)]
            torch.mm(x_wide, weight.t(), out=out) if bias is None else torch.addmm(bias, x_wide, weight.t(), out=out)
            row += len(weight)
            del weight  # frees it before the next one is allocated

    def _fp8_product(self, policy: ComputePolicy, x: Tensor, projected: Tensor | None, adapters: Adapters) -> Tensor:
        ranks = 0 if projected is None else projected.shape[1]
        weight = concat_weight_and_b(
            self.layers, adapters, lora_column_slices(adapters), ranks, policy.kernels, FP8, self.scale
        )
        rounded, scales = policy.kernels.quantize_rows(x, projected)
        bias = bias_of(self.layers, policy.dtype)
        return policy.kernels.fp8_product(rounded, scales, weight, self.scale, bias, policy.dtype)

    def _separate_products(self, policy: ComputePolicy, x: Tensor) -> Tensor:
        parts = [product(x, weight.t(), bias) for weight, bias in self._matrices(policy)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _matrices(self, policy: ComputePolicy) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The float weights with their biases: all as one matrix if they are cached, else layer by layer."""
        if self.cached is not None:
            weight, bias = self.cached
            yield weight.to(policy.dtype), None if bias is None else bias.to(policy.dtype)
        else:
            yield from ((layer.matrix(policy.dtype), layer.bias(policy.dtype)) for layer in self.layers)

    def _chunks(self, policy: ComputePolicy, adapters: Adapters) -> list[Chunk]:
        """The units of multiplication: all layers together, or with `low_memory` some rows of one layer at a time."""
        lora_columns = lora_column_slices(adapters)
        if not policy.low_memory:
            return [(self.layers, adapters, lora_columns)]
        chunks: list[Chunk] = []
        for layer, adapter, columns in zip(self.layers, adapters, lora_columns, strict=True):
            for rows, part in layer.row_chunks(_CHUNK_BYTES, policy.dtype.itemsize):
                own = replace(adapter, b_Nr=adapter.b_Nr[rows]) if adapter else None
                chunks.append(([part], [own], [columns]))
        return chunks

    def input_grad(
        self, policy: ComputePolicy, dy_wide: Tensor, adapters: Adapters, seeds: Tensor, *, need_dx: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradient with respect to x, and `s dy B`, which the gradient with respect to A needs.

        Args:
            policy: How products are computed.
            dy_wide: (T, N + R): the gradient with respect to the output, followed by R columns that this call fills;
                (T, N) unless `fused_lora`.
            adapters: Same as in `forward`.
            seeds: Same as in `forward`.
            need_dx: Whether the gradient with respect to x is needed.

        Returns:
            (T, K) or None, and (T, R) or None.
        """
        dy = dy_wide[:, : self.num_out]
        dxa = self._projection_grad(policy, dy_wide, adapters)
        if not need_dx:
            return None, dxa
        has_dropout = any(a and a.dropout for a in adapters)
        fused_adapters = [] if has_dropout else [a for a in adapters if a]  # those that are part of the base product
        if policy.fused_lora:
            dx = self._input_grad_fused(policy, dy_wide, fused_adapters)
        elif policy.fp8:
            dx = self._input_grad_fp8(policy, dy, dxa, fused_adapters)
        else:
            dx = self._input_grad_separate(policy, dy)
            if dxa is not None and not has_dropout:
                add_product_(dx, dxa, stack_a(adapters, policy.dtype))
        if dxa is not None and has_dropout:
            _add_dropout_input_grad_(policy, dx, dxa, adapters, seeds)
        return dx, dxa

    def _projection_grad(self, policy: ComputePolicy, dy_wide: Tensor, adapters: Adapters) -> Tensor | None:
        """`s dy B`, (T, R), in the last columns of `dy_wide` if `fused_lora`; None without adapters."""
        ranks = sum(a.rank for a in adapters if a)
        if not ranks:
            return None
        dy = dy_wide[:, : self.num_out]
        empty = dy.new_empty(len(dy), 0 if policy.fused_lora else ranks)
        dxa = dy_wide[:, self.num_out :] if policy.fused_lora else empty
        for adapter, columns, rows in self._adapter_slices(adapters):
            if policy.separate_lora:  # scaled below, all at once
                product(dy[:, rows], adapter.b_Nr.to(policy.dtype), out=dxa[:, columns])
                continue
            scaled = torch.empty(adapter.b_Nr.shape, dtype=policy.dtype, device=dy.device)
            torch.mul(adapter.b_Nr, adapter.scaling, out=scaled)
            torch.mm(dy[:, rows], scaled, out=dxa[:, columns])
        if policy.separate_lora:
            dxa.mul_(column_factors(adapters, dxa))
        return dxa

    def _input_grad_fused(self, policy: ComputePolicy, dy_wide: Tensor, fused_adapters: list[LoraWeights]) -> Tensor:
        dx, row, chunks = None, 0, self._chunks(policy, [None] * len(self.layers))
        for number, (layers, _, _) in enumerate(chunks, 1):
            own = fused_adapters if number == len(chunks) else []  # the R columns follow those of the last layer
            weight = stack_weight_and_a(layers, own, policy.kernels, policy.dtype)
            part = dy_wide[:, row : row + len(weight)]
            dx = torch.mm(part, weight) if dx is None else dx.addmm_(part, weight)
            row += len(weight)
            del weight
        assert dx is not None
        return dx

    def _input_grad_fp8(
        self, policy: ComputePolicy, dy: Tensor, dxa: Tensor | None, fused_adapters: list[LoraWeights]
    ) -> Tensor:
        rounded, scales = policy.kernels.quantize_rows(dy, dxa if fused_adapters else None)
        weight = stack_weight_and_a_transposed(self.layers, fused_adapters, policy.kernels, FP8, self.scale)
        return policy.kernels.fp8_product(rounded, scales, weight, self.scale, None, policy.dtype)

    def _input_grad_separate(self, policy: ComputePolicy, dy: Tensor) -> Tensor:
        dx, row = None, 0
        for weight, _ in self._matrices(policy):
            part = product(dy[:, row : row + len(weight)], weight)
            dx = part if dx is None else dx.add_(part)
            row += len(weight)
        assert dx is not None
        return dx

    def weight_grads(
        self, policy: ComputePolicy, dy: Tensor, x: Tensor, scaled: Tensor, dxa: Tensor | None,
        adapters: Adapters, seeds: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """Gradients with respect to A and B of each adapter, in order, in the dtype of the parameter.

        Args:
            policy: How products are computed.
            dy: (T, N or more): the gradient with respect to the output.
            x: (T, K): the input.
            scaled: The second result of `forward`.
            dxa: The second result of `input_grad`.
            adapters: Same as in `forward`.
            seeds: Same as in `forward`.
        """
        grads: list[Tensor] = []
        if dxa is None:
            return grads
        has_dropout = any(a and a.dropout for a in adapters)
        da_all = None if has_dropout else _matmul_fp32(dxa, x)
        for number, (adapter, columns, rows) in enumerate(self._adapter_slices(adapters)):
            if da_all is not None:
                da = da_all[columns]
            elif adapter.dropout:
                da = policy.kernels.dropout_project_weight_grad(dxa[:, columns], x, adapter.dropout, seeds[number])
            else:
                da = _matmul_fp32(dxa[:, columns], x)
            db = _matmul_fp32(dy[:, rows], scaled[:, columns])
            grads += [da.to(adapter.a_rK.dtype), db.to(adapter.b_Nr.dtype)]
        return grads

    def _adapter_slices(self, adapters: Adapters) -> list[tuple[LoraWeights, slice, slice]]:
        """Each adapter with its columns among the R ranks and the rows of its layer among the outputs."""
        parts, column, row = [], 0, 0
        for layer, adapter in zip(self.layers, adapters, strict=True):
            if adapter:
                parts.append((adapter, slice(column, column + adapter.rank), slice(row, row + layer.shape[0])))
                column += adapter.rank
            row += layer.shape[0]
        return parts


def _add_dropout_input_grad_(policy: ComputePolicy, dx: Tensor, dxa: Tensor, adapters: Adapters, seeds: Tensor) -> None:
    """Adds `dxa A` of each adapter to the gradient with respect to x, under its dropout mask."""
    for number, (adapter, columns) in enumerate(columns_of(adapters)):
        weight = adapter.a_rK.to(policy.dtype)
        if adapter.dropout:
            args = (dx, dxa[:, columns], weight, adapter.dropout, seeds[number])
            policy.kernels.dropout_project_input_grad_(*args)
        else:
            add_product_(dx, dxa[:, columns], weight)


def _matmul_fp32(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """`left.T @ right` in float32 (float64 for float64 factors), the dtype of the accumulator."""
    if left_TM.is_cuda and left_TM.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left_TM.t(), right_TN, out_dtype=torch.float32)
    return sum_of_products(left_TM, right_TN)
