"""InternLM2 on the fused path: one qkv projection whose rows are grouped by key head. See `test_layer` too."""

import pytest
import torch

from tests.fused.test_layer import error, force, step
from tests.tiny_models import DEVICE, dequantised, quantise, tiny_internlm2, with_adapter
from xtuner.fused.enable import enable_fused_training
from xtuner.kernels.dispatch import PLAIN

pytest.importorskip('bitsandbytes')


@pytest.mark.parametrize('targets', [['wqkv'], ['wo', 'w2'], ['w1', 'w3']])
@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 4), (4, 1)])
def test_adapters_on_some_projections_and_other_groups(batch, targets, heads, kv_heads):
    model = with_adapter(quantise(tiny_internlm2(heads=heads, kv_heads=kv_heads, bias=False)), targets=targets)
    _, exact = step(dequantised(model), batch)
    force(model, PLAIN, fused_lora=True)
    _, grads = step(model, batch)
    assert error(grads, exact) < 1e-4


def test_dropout_masks_are_those_of_the_same_seed_in_float64(batch):
    """With dropout the loss is a function of the seed: its slope along each gradient is the gradient's square."""
    model = with_adapter(tiny_internlm2(), dropout=0.2).double()
    force(model, PLAIN, fused_lora=False)

    def loss():
        torch.manual_seed(3)
        return step(model, batch)

    _, grads = loss()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    square = sum(float(g.square().sum()) for g in grads.values())
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(grads[name], alpha=sign * 1e-6)
        values.append(loss()[0])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.sub_(grads[name], alpha=sign * 1e-6)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(square, rel=1e-4)


def test_the_fused_path_is_taken_unasked(batch):
    model = with_adapter(quantise(tiny_internlm2()))
    path = enable_fused_training(model)
    assert path.enabled, path.reason_disabled
    _, grads = step(model, batch)
    assert not path.fallbacks and all(grad.norm() > 0 for grad in grads.values())
    if DEVICE == 'cpu':  # weights cached as floats: 5 projections in each of 2 layers
        assert path.reason_disabled == '10 of its 4-bit weights cached as floats'
