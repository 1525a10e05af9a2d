"""Activations that are offloaded to the host."""

from __future__ import annotations

import pytest
import torch

from tests.fused.test_layer import error, force, step
from tests.tiny_models import quantise, tiny_llama, with_adapter
from xtuner.fused.offload import HostOffload
from xtuner.kernels.dispatch import PLAIN


class _FakeOffload:
    """Stands in for `HostOffload`: keeps copies on the device."""

    def __init__(self, depth):
        self.depth, self.pinned, self.num_reloads = depth, [], 0

    select = HostOffload.select

    def offload(self, tensors):
        self.pinned.append([t.clone() for t in tensors])
        return len(self.pinned) - 1

    def reload(self, index):
        self.num_reloads += 1
        return self.pinned[index]

    def prefetch(self):
        pass


@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_offloading_to_the_host_changes_nothing(batch, depth, folded, dropout):
    model = with_adapter(quantise(tiny_llama(layers=4)), dropout=dropout)
    force(model, PLAIN, fused_lora=folded)
    torch.manual_seed(2)
    _, expected = step(model, batch)
    decoder = model.get_base_model().model
    decoder.gradient_checkpointing_enable({'use_reentrant': False})
    offload = _FakeOffload(depth)
    decoder.forward.fused.memory.host_offload = lambda *_: offload
    torch.manual_seed(2)
    _, grads = step(model, batch)
    assert offload.num_reloads == 3
    assert {len(tensors) for tensors in offload.pinned} == ({2, 3} if depth == 3 else {depth})
    assert error(grads, expected) < 1e-5
