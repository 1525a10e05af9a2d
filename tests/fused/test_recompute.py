"""How many layers are computed again: the count, the memory it is made of, and that it changes no gradient."""

import logging

import pytest
import torch

from tests.fused.test_layer import error, force, step
from tests.tiny_models import quantise, tiny_llama, with_adapter
from xtuner.fused import recompute
from xtuner.fused.enable import enable_fused_training
from xtuner.kernels.dispatch import PLAIN

pytest.importorskip('bitsandbytes')


def test_kept_bytes_are_those_of_what_a_layer_keeps(batch):
    """Counted over the tensors that `layer_forward` really returns."""
    from xtuner.fused import layer

    model = with_adapter(quantise(tiny_llama(kv_heads=2)))
    force(model, PLAIN, fused_lora=True)
    seen = []

    def spy(run, x, *, differentiable):
        out, kept = plain_forward(run, x, differentiable=differentiable)
        tensors = [x, kept.attention.qkv, kept.attention.out, kept.middle, kept.gate_up, *kept.scaled]
        ranks = [sum(a.rank for a in group if a) for group in run.adapters]
        seen.append((sum(t.numel() * 4 for t in tensors), recompute.kept_bytes(run.parts, len(x), ranks, 4), len(x)))
        return out, kept

    plain_forward = layer.layer_forward
    layer.layer_forward = spy
    try:
        step(model, batch)
    finally:
        layer.layer_forward = plain_forward
    for held, predicted, tokens in seen:
        assert predicted == held + 4 * 4 * tokens  # and a float32 for each of the four heads


def test_what_comes_back_from_the_host_is_not_computed_and_changes_nothing(batch):
    """A GPU's store gives back the state between the halves, and gate and up: then attention comes last."""
    from xtuner.fused import layer

    model = with_adapter(quantise(tiny_llama(layers=2)), dropout=0.2)
    force(model, PLAIN, fused_lora=True)
    backward, compared = layer.layer_backward, []

    def spy(run, x, dout, kept, *, need_dx):
        middle, gate_up = kept.middle.clone(), kept.gate_up.clone()
        ways = [(None, None), (middle, None), (middle, gate_up)]
        others = [layer.recompute_layer(run, x, *way) for way in ways]
        assert [other.attention is None for other in others] == [False, True, True]
        found = [backward(run, x, dout, other, need_dx=need_dx) for other in [*others, kept]]
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


@pytest.mark.parametrize(('layers_that_fit', 'again'), [(0, 3), (1, 3), (2, 2), (3, 1), (4, 0), (99, 0)])
def test_layers_that_do_not_fit_are_computed_again(batch, monkeypatch, caplog, layers_that_fit, again):
    model = with_adapter(quantise(tiny_llama(layers=4)), dropout=0.2)
    force(model, PLAIN, fused_lora=False)
    torch.manual_seed(2)
    _, expected = step(model, batch)
    path = enable_fused_training(model, recompute_by_memory=True)
    fast = model.get_base_model().model.forward.fast
    parts, tokens = fast.layers[0], batch['input_ids'].numel()
    one = recompute.kept_bytes(parts, tokens, [24, 8, 16, 8], 4)
    room = int(layers_that_fit * one + recompute.working_bytes(parts, tokens, 4) + one // 2)
    monkeypatch.setattr('xtuner.fused.decoder.activation_budget_bytes', lambda *_: room)
    computed = []
    once = fast._num_recomputed
    monkeypatch.setattr(fast, '_num_recomputed', lambda *args: computed.append(once(*args)) or computed[-1])
    torch.manual_seed(2)
    with caplog.at_level(logging.INFO, 'xtuner'):
        _, grads = step(model, batch)
    assert path.taken and computed == [again]
    assert f'{again} of 4 layers are computed twice' in caplog.text
    assert error(grads, expected) < 1e-5


def test_room_leaves_what_is_still_to_come():
    most = recompute.activation_budget_bytes(10 * 2**30, 0, 'cpu')
    assert most == (10 * 2**30 - 2**29) // 2
    assert recompute.activation_budget_bytes(10 * 2**30, 2**20, 'cpu') == most - 8 * 2**20


def test_under_fully_shard_room_is_left_for_weights_that_are_put_together(batch, monkeypatch):
    """Two layers, each twice; or one beside the head, where that is larger."""
    free = []
    monkeypatch.setattr('xtuner.fused.decoder.free_bytes', lambda _: 10 * 2**30)
    monkeypatch.setattr('xtuner.fused.decoder.activation_budget_bytes', lambda room, *_: free.append(room) or room)
    for sharded in (False, True):
        model = with_adapter(tiny_llama(layers=4))
        enable_fused_training(model, recompute_by_memory=True, sharded=sharded)
        step(model, batch)
    decoder = model.get_base_model().model
    layer = 4 * sum(p.numel() for p in decoder.layers[0].parameters())
    assert free[0] - free[1] == 4 * layer
    wide = torch.empty(100, layer)  # four times 100 layers
    assert recompute.gathered_bytes(decoder.layers[0].parameters(), wide) == layer + 400 * layer
