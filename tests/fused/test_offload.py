"""Activations that are kept on the host."""

from __future__ import annotations

import pytest
import torch

from tests.fused.test_layer import error, force, step
from tests.tiny_models import quantise, tiny_llama, with_adapter
from xtuner.fused.offload import HostOffload
from xtuner.kernels.dispatch import PLAIN


class _Shelf:
    """Stands in for the host store: keeps tensors as they are, hands copies back."""

    def __init__(self, depth):
        self.depth, self.kept, self.taken = depth, [], 0

    select = HostOffload.select

    def offload(self, tensors):
        self.kept.append([t.clone() for t in tensors])
        return len(self.kept) - 1

    def reload(self, place):
        self.taken += 1
        return self.kept[place]

    def prefetch(self):
        pass


@pytest.mark.parametrize('depth', [1, 2, 3])
@pytest.mark.parametrize('folded', [False, True])
@pytest.mark.parametrize('dropout', [0.0, 0.2])
def test_what_checkpoints_keep_on_the_host_changes_nothing(batch, depth, folded, dropout):
    model = with_adapter(quantise(tiny_llama(layers=4)), dropout=dropout)
    force(model, PLAIN, fused_lora=folded)
    torch.manual_seed(2)
    _, expected = step(model, batch)
    decoder = model.get_base_model().model
    decoder.gradient_checkpointing_enable({'use_reentrant': False})
    shelf = _Shelf(depth)
    decoder.forward.fast._store = lambda *_: shelf
    torch.manual_seed(2)
    _, grads = step(model, batch)
    assert shelf.taken == 3 and {len(kept) for kept in shelf.kept} == ({2, 3} if depth == 3 else {depth})
    assert error(grads, expected) < 1e-5
