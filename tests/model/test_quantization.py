"""4-bit layers on a CPU: a generated sample must leave them as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xtuner.config.schema import QuantizationConfig
from xtuner.kernels.quantized import unpack_weight
from xtuner.model.loading import load_model
from xtuner.model.quantization import keep_plain_layout, read_blocks_across_rows


def test_evaluation_leaves_a_4_bit_model_trainable_and_exact(tiny_internlm: Path) -> None:
    model = load_model(tiny_internlm, dtype=torch.float32, quantization=QuantizationConfig())
    ids = torch.randint(3, 800, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.train()(ids).logits
        evaluated = model.eval()(ids).logits
    assert torch.equal(evaluated, before), 'evaluation computes with other numbers than training'
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train()(inputs_embeds=embeddings).logits.sum().backward()
    assert embeddings.grad.abs().max() > 0


@pytest.mark.parametrize('nested', [True, False])
def test_a_width_that_is_no_multiple_of_a_block(nested: bool) -> None:
    """Each value against its code and the scale of its block, counted across rows, and the gradient by the input."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    plain = torch.nn.Linear(176, 48)
    layer = Linear4bit(176, 48, compute_dtype=torch.float32, quant_type='nf4', compress_statistics=nested)
    layer.load_state_dict(plain.state_dict())
    layer.to('cpu').requires_grad_(False)  # quantises
    holder = torch.nn.Sequential(layer)
    keep_plain_layout(holder)
    assert read_blocks_across_rows(holder) == 1
    parts = unpack_weight(layer)
    codes = torch.stack([parts.packed.flatten() >> 4, parts.packed.flatten() & 15], dim=1).flatten().long()
    weight = (parts.table[codes] * parts.scales().repeat_interleave(64)).view(48, 176)
    assert (weight - plain.weight).abs().mean() < 0.1 * plain.weight.abs().mean()
    x = torch.randn(5, 176, requires_grad=True)
    out = holder(x)
    assert torch.allclose(out, x @ weight.t() + plain.bias, atol=1e-5)
    out.sum().backward()
    assert torch.allclose(x.grad, weight.sum(0).expand(5, -1), atol=1e-5)
