"""Checks that bitsandbytes works, and configures its layers for the CPU."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xtuner.errors import ModelError, first_line
from xtuner.kernels.dequantize import dequantized
from xtuner.kernels.quantized import is_4bit, quant_state_of

_WIDTH = 64  # width of the test layer: one quantization block


def check_bitsandbytes(bits: int, device: torch.device) -> None:
    """Quantizes and runs a small layer, so that a broken installation is detected before a model is loaded.

    Args:
        bits: 4 or 8.
        device: Where the model will be.

    Raises:
        ModelError: bitsandbytes is not installed or cannot run on the device; names the versions.
    """
    try:
        import bitsandbytes
    except Exception as error:  # a broken installation can raise anything
        raise ModelError(f'loading in {bits} bit needs bitsandbytes, which cannot be imported: {error}') from error
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    try:
        layer = kind(_WIDTH, _WIDTH, bias=False)
        if bits == 8:
            layer.weight.requires_grad_(False)
        layer = layer.to(device)
        finite = torch.isfinite(layer(torch.randn(2, _WIDTH, device=device))).all()
    except Exception as error:
        raise ModelError(
            f'bitsandbytes {bitsandbytes.__version__} cannot compute in {bits} bit on {device} (torch '
            f'{torch.__version__}, CUDA {torch.version.cuda}): {first_line(error)}; install a bitsandbytes for this '
            'CUDA, or use a lora config, which does not need it'
        ) from error
    if not finite:
        raise ModelError(f'bitsandbytes {bitsandbytes.__version__} returns non-finite values in {bits} bit on {device}')


def keep_plain_layout(model: nn.Module) -> int:
    """Keeps 4-bit layers on a CPU in the layout in which they were quantized.

    On processors with AVX512-BF16, bitsandbytes repacks a layer's weight at its first forward pass in evaluation mode.
    The repacked layer always computes in bfloat16, fails for widths that are not a multiple of 64, has no backward
    pass and cannot be converted back, so that a single sample generated during training would end the run.

    Args:
        model: Any model.

    Returns:
        The number of 4-bit layers.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, 'support_avx512bf16_for_cpu')]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


def read_blocks_across_rows(model: nn.Module) -> int:
    """Makes 4-bit layers on a CPU dequantize correctly for any width.

    Blocks of values that share a scale continue across rows. bitsandbytes' CPU kernel starts a new block at each row:
    if the width is not a multiple of the block, it uses other scales than quantization did and than a GPU does.

    Args:
        model: Any model.

    Returns:
        The number of affected layers; their `forward` is replaced on the instance.
    """
    layers: list[Any] = [m for m in model.modules() if is_4bit(m) and m.weight.device.type == 'cpu']
    layers = [layer for layer in layers if layer.in_features % quant_state_of(layer).blocksize]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def _forward(self: Any, x: Tensor) -> Tensor:
    if self.weight.device.type != 'cpu':
        return type(self).forward(self, x)
    weight = dequantized(self, self.compute_dtype or x.dtype)
    bias = None if self.bias is None else self.bias.to(weight.dtype)
    return functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
