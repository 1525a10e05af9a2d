"""Selects the kernels for a device: Triton on CUDA, plain PyTorch elsewhere."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from xtuner.kernels import reference, reference_softmax

NAMES = (
    'dequantize_into', 'dequantize_transposed_into', 'quantize_rows', 'fp8_product', 'copy_rows', 'rms_norm',
    'rms_norm_backward', 'rotate', 'swiglu', 'swiglu_backward_',
    'dropout_project', 'dropout_project_weight_grad', 'dropout_project_input_grad_', 'cross_entropy_',
    'softmax_sums', 'softmax_gradient_',
)  # fmt: skip


@dataclass(frozen=True)
class Kernels:
    """A set of kernels; `reference` documents each function."""

    name: str
    dequantize_into: Callable
    dequantize_transposed_into: Callable
    quantize_rows: Callable
    fp8_product: Callable
    copy_rows: Callable
    rms_norm: Callable
    rms_norm_backward: Callable
    rotate: Callable
    swiglu: Callable
    swiglu_backward_: Callable
    dropout_project: Callable
    dropout_project_weight_grad: Callable
    dropout_project_input_grad_: Callable
    cross_entropy_: Callable
    softmax_sums: Callable
    softmax_gradient_: Callable


PLAIN = Kernels('plain', *(getattr(reference, name, None) or getattr(reference_softmax, name) for name in NAMES))


@lru_cache(maxsize=1)
def fused_kernels() -> Kernels:
    """Returns the Triton kernels.

    Raises:
        ImportError: Triton is not installed.

    """
    from xtuner.kernels.triton import cross_entropy, dropout, elementwise, fp8, nf4, softmax_sums

    modules = (nf4, fp8, elementwise, dropout, cross_entropy, softmax_sums)
    return Kernels('triton', *(next(getattr(m, n) for m in modules if n in m.__dict__) for n in NAMES))


def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec('triton') is not None


def kernels_for(device: torch.device) -> Kernels:
    """Returns the kernels for tensors on a device."""
    return fused_kernels() if device.type == 'cuda' and has_triton() else PLAIN
