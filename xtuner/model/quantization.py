"""What bitsandbytes needs to be told about its 4-bit layers on a CPU."""

from __future__ import annotations

from torch import nn


def keep_plain_layout(model: nn.Module) -> int:
    """Keeps 4-bit layers on a CPU in the layout that they were quantised in.

    On processors with AVX512-BF16, bitsandbytes repacks a layer's weight at its first forward pass in evaluation mode.
    The repacked layer computes in bfloat16 whatever was asked, fails on widths that are no multiple of 64, has no
    backward pass and does not turn back, so that a single sample generated during training would end the run.

    Args:
        model: Any model.

    Returns:
        How many 4-bit layers were told.
    """
    layers = [module for module in model.modules() if hasattr(module, 'support_avx512bf16_for_cpu')]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
