"""Number of recomputed layers: the count, the memory it is based on, and that it changes no gradient."""

import logging

import pytest
import torch

from tests.fused.test_layer import error, force, step
from tests.tiny_models import quantise, tiny_llama, with_adapter
from xtuner.fused import recompute
from xtuner.fused.enable import enable_fused_training
from xtuner.kernels.dispatch import PLAIN

pytest.importorskip('bitsandbytes')


def test_saved_bytes_are_the_size_of_the_saved_activations(batch):
    """Counted over the tensors that `layer_forward` really returns."""
    from xtuner.fused import layer

    model = with_adapter(quantise(tiny_llama(kv_heads=2)))
    force(model, PLAIN, fused_lora=True)
    seen = []

    def spy(run, x, *, differentiable):
        out, saved = plain_forward(run, x, differentiable=differentiable)
        tensors = [x, saved.attention.qkv, saved.attention.out, saved.middle, saved.gate_up, *saved.scaled]
        ranks = [sum(a.rank for a in group if a) for group in run.adapters]
        seen.append((sum(t.numel() * 4 for t in tensors), recompute.saved_bytes(run.parts, len(x), ranks, 4), len(x)))
        return out, saved

    plain_forward = layer.layer_forward
    layer.layer_forward = spy
    try:
        step(model, batch)
    finally:
        layer.layer_forward = plain_forward
    for held, predicted, tokens in seen:
        assert predicted == held + 4 * 4 * tokens  # and a float32 for each of the four heads


def test_reloaded_activations_are_not_recomputed_and_change_no_gradient(batch):
    """Offloading may reload `middle`, and gate and up: then attention is recomputed last."""
    from xtuner.fused import layer

    model = with_adapter(quantise(tiny_llama(layers=2)), dropout=0.2)
    force(model, PLAIN, fused_lora=True)
    backward, compared = layer.layer_backward, []

    def spy(run, x, dout, saved, *, need_dx):
        middle, gate_up = saved.middle.clone(), saved.gate_up.clone()
        ways = [(None, None), (middle, None), (middle, gate_up)]
        others = [layer.recompute_layer(run, x, *way) for way in ways]
        assert [other.attention is None for other in others] == [False, True, True]
        found = [backward(run, x, dout, other, need_dx=need_dx) for other in [*others, saved]]
        for dx, grads in found[:-1]:
            # what an adapter multiplies is another product where its layer is not computed, of the same numbers
            compared.extend(
                (g - e).abs().max() <= 1e-6 * e.abs().max() for g, e in zip(grads, found[-1][1], strict=True)
            )
            assert (dx is None) == (not need_dx) and (dx is None or torch.equal(dx, found[-1][0]))
        return found[-1]

    layer.layer_backward = spy
    try:
        step(model, batch)
    finally:
        layer.layer_backward = backward
    assert len(compared) == 2 * 3 * 14 and all(compared)  # layers, ways, adapters' gradients


@pytest.mark.parametrize(('layers_that_fit', 'recomputed'), [(0, 3), (1, 3), (2, 2), (3, 1), (4, 0), (99, 0)])
def test_layers_that_do_not_fit_are_recomputed(batch, monkeypatch, caplog, layers_that_fit, recomputed):
    model = with_adapter(quantise(tiny_llama(layers=4)), dropout=0.2)
    force(model, PLAIN, fused_lora=False)
    torch.manual_seed(2)
    _, expected = step(model, batch)
    path = enable_fused_training(model, recompute_by_memory=True)
    fused = model.get_base_model().model.forward.fused
    parts, tokens = fused.layers[0], batch['input_ids'].numel()
    one = recompute.saved_bytes(parts, tokens, [24, 8, 16, 8], 4)
    budget = int(layers_that_fit * one + recompute.working_bytes(parts, tokens, 4) + one // 2)
    monkeypatch.setattr('xtuner.fused.recompute.activation_budget_bytes', lambda *_: budget)
    computed = []
    once = fused.memory.num_recomputed
    monkeypatch.setattr(fused.memory, 'num_recomputed', lambda *args: computed.append(once(*args)) or computed[-1])
    torch.manual_seed(2)
    with caplog.at_level(logging.INFO, 'xtuner'):
        _, grads = step(model, batch)
    assert path.enabled and computed == [recomputed]
    assert f'recomputing {recomputed} of 4 layers' in caplog.text
    assert error(grads, expected) < 1e-5


def test_the_budget_leaves_memory_for_gradients_and_moments():
    most = recompute.activation_budget_bytes(10 * 2**30, 0, 'cpu')
    assert most == (10 * 2**30 - 2**29) // 2
    assert recompute.activation_budget_bytes(10 * 2**30, 2**20, 'cpu') == most - 8 * 2**20


def test_under_fully_shard_the_budget_leaves_memory_for_gathered_weights(batch, monkeypatch):
    """Two layers, each twice; or one layer and the head, if that is larger."""
    free = []
    monkeypatch.setattr('xtuner.fused.recompute.free_bytes', lambda _: 10 * 2**30)
    budget = 'xtuner.fused.recompute.activation_budget_bytes'
    monkeypatch.setattr(budget, lambda num_bytes, *_: free.append(num_bytes) or num_bytes)
    for sharded in (False, True):
        model = with_adapter(tiny_llama(layers=4))
        enable_fused_training(model, recompute_by_memory=True, sharded=sharded)
        step(model, batch)
    decoder = model.get_base_model().model
    layer = 4 * sum(p.numel() for p in decoder.layers[0].parameters())
    assert free[0] - free[1] == 4 * layer
    wide = torch.empty(100, layer)  # four times 100 layers
    assert recompute.gathered_bytes(decoder.layers[0].parameters(), wide) == layer + 400 * layer
