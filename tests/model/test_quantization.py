"""4-bit layers on a CPU: a generated sample must leave them as they were."""

from __future__ import annotations

from pathlib import Path

import torch

from xtuner.config.schema import QuantizationConfig
from xtuner.model.loading import load_model


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
