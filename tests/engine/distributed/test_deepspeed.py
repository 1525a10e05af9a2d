"""What DeepSpeed's own functions are not needed for."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from xtuner.engine.distributed.deepspeed import ZeRO


def test_an_optimizer_without_state_is_saved_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD without momentum: what a single process would save."""
    utils: Any = ModuleType('deepspeed.utils')
    names = ('safe_get_full_optimizer_state', 'safe_set_full_optimizer_state', 'safe_set_local_optimizer_state')
    for name in names:
        setattr(utils, name, MagicMock(side_effect=AssertionError(name)))
    monkeypatch.setitem(sys.modules, 'deepspeed.utils', utils)
    model = nn.Linear(2, 3)
    single = torch.optim.SGD(model.parameters(), lr=0.5)
    flat = torch.optim.SGD([torch.zeros(9, requires_grad=True)], lr=0.5)  # all parameters, as stages 1 and 2 hold them
    strategy: Any = ZeRO.__new__(ZeRO)
    strategy.bare, strategy._inner, strategy._shards_weights = model, flat, False
    strategy.optimizer = SimpleNamespace()
    saved = strategy.optimizer_state()
    assert saved == single.state_dict()
    strategy.load_optimizer_state(saved)
    assert not flat.state
