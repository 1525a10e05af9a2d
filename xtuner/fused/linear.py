"""Frozen linear layers with trainable low-rank adapters, one or several on the same input, forward and backward.

On CUDA a group is one product: the layers' weights are turned into floats side by side in one buffer, the adapters
appended to the inner dimension, so that `[x | x A'] [W | s B]'` is base and adapter at once, `[dy | s dy B] [W ; A]`
the whole gradient by x; with `fp8` both factors are rounded to FP8 first. Elsewhere (`fused_lora` off) each layer is
its own product and the adapter is added to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtuner.fused.frozen import Frozen, FrozenLinear, LoraWeights
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
from xtuner.kernels.dispatch import Kernels

FP8 = torch.float8_e4m3fn
_SLIM_BYTES = 24 * 2**20  # of a piece of a weight as floats, where that buffer would be most of the memory
Piece = tuple[Sequence[Frozen], Sequence[LoraWeights | None], Sequence[slice | None]]


@dataclass
class ComputePolicy:
    """How a batch is computed: the kernels, the dtype of products, how adapters and weights are multiplied."""

    kernels: Kernels
    dtype: torch.dtype
    fused_lora: bool
    fp8: bool = False  # frozen weights and adapters are multiplied in FP8; `fused_lora` is off then
    low_memory: bool = False  # a piece of a weight as floats at a time, for least memory

    @property
    def separate_lora(self) -> bool:
        """Whether adapters are multiplied by themselves."""
        return not self.fused_lora and not self.fp8


class Group:
    """Linear layers that read the same input. Holds no activations: those pass through as arguments."""

    def __init__(self, layers: list[FrozenLinear]) -> None:
        self.layers = layers
        self.kept: tuple[Tensor, Tensor | None] | None = None  # weights as floats and biases of all layers; see `keep`
        self.scale = torch.ones(())  # of weights and adapters in FP8; `fp8.WeightScales` keeps it
        self.num_in = layers[0].shape[1]
        self.num_out = sum(layer.shape[0] for layer in layers)

    @property
    def is_4bit(self) -> bool:
        """Whether all its weights are in 4 bit."""
        return all(layer.parts() is not None for layer in self.layers)

    def keep(self, dtype: torch.dtype) -> None:
        """Turns its weights into floats for good, one below the other."""
        self.kept = torch.cat([layer.matrix(dtype) for layer in self.layers]), bias_of(self.layers, dtype)

    def forward(
        self, how: ComputePolicy, x_wide: Tensor, adapters: list[LoraWeights | None], seeds: Tensor, *, spare: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Computes the group's outputs.

        Args:
            how: The batch's setting.
            x_wide: (T, K + R): the input, with room for R columns that this call fills; (T, K) unless `fused_lora`.
            adapters: One a layer, or None.
            seeds: int64 (n,): of the dropout masks, one a layer.
            spare: Columns to leave free to the right of the output, for `backward` to use.

        Returns:
            The output, (T, N + spare), and what the adapters' gradients need: `s x A'`, (T, R).

        """
        x = x_wide[:, : self.num_in]
        projected = self._project(how, x_wide, x, adapters, seeds)
        if how.fused_lora:
            out = torch.empty(len(x), self.num_out + spare, dtype=how.dtype, device=x.device)
            self._fused_lora_product(how, x_wide, adapters, out[:, : self.num_out])
        elif how.fp8:
            out = self._fp8_product(how, x, projected, adapters)
        else:
            out = self._separate_products(how, x)
        scaled = torch.empty(0, device=x.device)
        if projected is not None:
            scaled = projected * column_factors(adapters, projected)
            for adapter, columns, rows in self._parts_with(adapters) if how.separate_lora else ():
                add_product_(out[:, rows], scaled[:, columns], adapter.b_Nr.to(how.dtype).t())
        return out, scaled

    def scaled_projection(
        self, how: ComputePolicy, x: Tensor, adapters: list[LoraWeights | None], seeds: Tensor
    ) -> Tensor:
        """`s x A'` alone, (T, R): what `forward` returns beside the output."""
        if not any(adapters):
            return torch.empty(0, device=x.device)
        apart = ComputePolicy(how.kernels, how.dtype, fused_lora=False)
        projected = self._project(apart, x, x, adapters, seeds)
        assert projected is not None
        return projected * column_factors(adapters, projected)

    def _project(
        self, how: ComputePolicy, x_wide: Tensor, x: Tensor, adapters: list[LoraWeights | None], seeds: Tensor
    ) -> Tensor | None:
        """`x A'` of all adapters side by side: (T, R), in the tail of `x_wide` where `fused_lora`."""
        ranks = sum(a.rank for a in adapters if a)
        if not ranks:
            return None
        out = (
            x_wide[:, self.num_in :] if how.fused_lora else torch.empty(len(x), ranks, dtype=how.dtype, device=x.device)
        )
        if not any(a and a.dropout for a in adapters):
            return product(x, stack_a(adapters, how.dtype).t(), out=out)
        for number, (adapter, columns) in enumerate(columns_of(adapters)):
            weight = adapter.a_rK.to(how.dtype)
            if adapter.dropout:
                how.kernels.dropout_project(x, weight, adapter.dropout, seeds[number], out[:, columns])
            else:
                product(x, weight.t(), out=out[:, columns])
        return out

    def _fused_lora_product(
        self, how: ComputePolicy, x_wide: Tensor, adapters: list[LoraWeights | None], y: Tensor
    ) -> None:
        row, ranks = 0, x_wide.shape[1] - self.num_in
        for layers, own, tails in self._pieces(how, adapters):
            weight = concat_weight_and_b(layers, own, tails, ranks, how.kernels, how.dtype)
            bias, out = bias_of(layers, how.dtype), y[:, row : row + len(weight)]
            torch.mm(x_wide, weight.t(), out=out) if bias is None else torch.addmm(bias, x_wide, weight.t(), out=out)
            row += len(weight)
            del weight  # before the next one takes its place

    def _fp8_product(
        self, how: ComputePolicy, x: Tensor, projected: Tensor | None, adapters: list[LoraWeights | None]
    ) -> Tensor:
        ranks = 0 if projected is None else projected.shape[1]
        weight = concat_weight_and_b(
            self.layers, adapters, lora_column_slices(adapters), ranks, how.kernels, FP8, self.scale
        )
        rounded, scales = how.kernels.quantize_rows(x, projected)
        bias = bias_of(self.layers, how.dtype)
        return how.kernels.fp8_product(rounded, scales, weight, self.scale, bias, how.dtype)

    def _separate_products(self, how: ComputePolicy, x: Tensor) -> Tensor:
        parts = [product(x, weight.t(), bias) for weight, bias in self._matrices(how)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _matrices(self, how: ComputePolicy) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The weights as floats with their biases: all as one matrix where they are kept, else a layer at a time."""
        if self.kept is not None:
            weight, bias = self.kept
            yield weight.to(how.dtype), None if bias is None else bias.to(how.dtype)
        else:
            yield from ((layer.matrix(how.dtype), layer.bias(how.dtype)) for layer in self.layers)

    def _pieces(self, how: ComputePolicy, adapters: list[LoraWeights | None]) -> list[Piece]:
        """What is multiplied at a time: all layers, or some rows of one where the weight as floats must stay small."""
        tails = lora_column_slices(adapters)
        if not how.low_memory:
            return [(self.layers, adapters, tails)]
        pieces: list[Piece] = []
        for layer, adapter, tail in zip(self.layers, adapters, tails, strict=True):
            for rows, part in layer.pieces(_SLIM_BYTES, how.dtype.itemsize):
                own = replace(adapter, b_Nr=adapter.b_Nr[rows]) if adapter else None
                pieces.append(([part], [own], [tail]))
        return pieces

    def input_grad(
        self,
        how: ComputePolicy,
        dy_wide: Tensor,
        adapters: list[LoraWeights | None],
        seeds: Tensor,
        *,
        need_dx: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient by x, and `s dy B`, which the gradient by A needs.

        Args:
            how: The batch's setting.
            dy_wide: (T, N + R): the gradient by the output, with room for R columns that this call fills; (T, N)
                unless `fused_lora`.
            adapters: As in `forward`.
            seeds: As in `forward`.
            need_dx: Whether the gradient by x is wanted.

        Returns:
            (T, K) or None, and (T, R) or None.

        """
        ranks = sum(a.rank for a in adapters if a)
        dy = dy_wide[:, : self.num_out]
        dxa = None
        if ranks:
            empty = dy.new_empty(len(dy), 0 if how.fused_lora else ranks)
            dxa = dy_wide[:, self.num_out :] if how.fused_lora else empty
            for adapter, columns, rows in self._parts_with(adapters):
                if how.separate_lora:  # scaled afterwards, all at once
                    product(dy[:, rows], adapter.b_Nr.to(how.dtype), out=dxa[:, columns])
                    continue
                scaled = torch.empty(adapter.b_Nr.shape, dtype=how.dtype, device=dy.device)
                torch.mul(adapter.b_Nr, adapter.scaling, out=scaled)
                torch.mm(dy[:, rows], scaled, out=dxa[:, columns])
            if how.separate_lora:
                dxa.mul_(column_factors(adapters, dxa))
        if not need_dx:
            return None, dxa
        dropped = any(a and a.dropout for a in adapters)
        tail = [] if dropped else [a for a in adapters if a]  # what is part of the big product
        if how.fused_lora:
            dx = self._input_grad_fused(how, dy_wide, tail)
        elif how.fp8:
            dx = self._input_grad_fp8(how, dy, dxa, tail)
        else:
            dx = self._input_grad_separate(how, dy)
            if dxa is not None and not dropped:
                add_product_(dx, dxa, stack_a(adapters, how.dtype))
        if dxa is not None and dropped:
            for number, (adapter, columns) in enumerate(columns_of(adapters)):
                weight = adapter.a_rK.to(how.dtype)
                if adapter.dropout:
                    args = (dx, dxa[:, columns], weight, adapter.dropout, seeds[number])
                    how.kernels.dropout_project_input_grad_(*args)
                else:
                    add_product_(dx, dxa[:, columns], weight)
        return dx, dxa

    def _input_grad_fused(self, how: ComputePolicy, dy_wide: Tensor, tail: list[LoraWeights]) -> Tensor:
        dx, row, pieces = None, 0, self._pieces(how, [None] * len(self.layers))
        for number, (layers, _, _) in enumerate(pieces, 1):
            extra = tail if number == len(pieces) else []  # the ranks' columns follow the last layer's
            weight = stack_weight_and_a(layers, extra, how.kernels, how.dtype)
            part = dy_wide[:, row : row + len(weight)]
            dx = torch.mm(part, weight) if dx is None else dx.addmm_(part, weight)
            row += len(weight)
            del weight
        assert dx is not None
        return dx

    def _input_grad_fp8(self, how: ComputePolicy, dy: Tensor, dxa: Tensor | None, tail: list[LoraWeights]) -> Tensor:
        rounded, scales = how.kernels.quantize_rows(dy, dxa if tail else None)
        weight = stack_weight_and_a_transposed(self.layers, tail, how.kernels, FP8, self.scale)
        return how.kernels.fp8_product(rounded, scales, weight, self.scale, None, how.dtype)

    def _input_grad_separate(self, how: ComputePolicy, dy: Tensor) -> Tensor:
        dx, row = None, 0
        for weight, _ in self._matrices(how):
            part = product(dy[:, row : row + len(weight)], weight)
            dx = part if dx is None else dx.add_(part)
            row += len(weight)
        assert dx is not None
        return dx

    def weight_grads(
        self, how: ComputePolicy, dy: Tensor, x: Tensor, scaled: Tensor, dxa: Tensor | None,
        adapters: list[LoraWeights | None], seeds: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients by each adapter's A and B, in order, in the dtype of the parameter.

        Args:
            how: The batch's setting.
            dy: (T, N or more): the gradient by the output.
            x: (T, K): the input.
            scaled: What `forward` returned beside the output.
            dxa: What `input_grad` returned.
            adapters: As in `forward`.
            seeds: As in `forward`.

        """
        grads: list[Tensor] = []
        if dxa is None:
            return grads
        dropped = any(a and a.dropout for a in adapters)
        da_all = None if dropped else _sum_wide(dxa, x)
        for number, (adapter, columns, rows) in enumerate(self._parts_with(adapters)):
            if da_all is not None:
                da = da_all[columns]
            elif adapter.dropout:
                da = how.kernels.dropout_project_weight_grad(dxa[:, columns], x, adapter.dropout, seeds[number])
            else:
                da = _sum_wide(dxa[:, columns], x)
            db = _sum_wide(dy[:, rows], scaled[:, columns])
            grads += [da.to(adapter.a_rK.dtype), db.to(adapter.b_Nr.dtype)]
        return grads

    def _parts_with(self, adapters: list[LoraWeights | None]) -> list[tuple[LoraWeights, slice, slice]]:
        """Each adapter with its columns among the ranks and its layer's rows among the outputs."""
        parts, column, row = [], 0, 0
        for layer, adapter in zip(self.layers, adapters, strict=True):
            if adapter:
                parts.append((adapter, slice(column, column + adapter.rank), slice(row, row + layer.shape[0])))
                column += adapter.rank
            row += layer.shape[0]
        return parts


def _sum_wide(left_TM: Tensor, right_TN: Tensor) -> Tensor:
    """`left.T @ right`, which leaves the accumulator in float32 (float64 for float64 factors)."""
    if left_TM.is_cuda and left_TM.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left_TM.t(), right_TN, out_dtype=torch.float32)
    return sum_of_products(left_TM, right_TN)
