"""What a step must have: a gradient for each adapter, but for experts that no token was routed to."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from xtuner.engine.step.checks import check_gradients
from xtuner.errors import TrainingError


class Experts(nn.Module):
    """Four experts of which some are used, and one layer behind them."""

    def __init__(self, used: tuple[int, ...]) -> None:
        super().__init__()
        self.used = used
        self.experts = nn.ModuleList(nn.ModuleDict({'up_proj': nn.Linear(4, 4)}) for _ in range(4))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for number in self.used:
            x = self.experts[number]['up_proj'](x)
        return self.head(x)


def trained(used: tuple[int, ...], *, targets: list[str]) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Experts(used), LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    model(torch.randn(3, 4)).sum().backward()
    return model


def test_an_expert_without_tokens_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger='xtuner'):
        check_gradients(trained((0, 2), targets=['up_proj', 'head']), step=0)
    assert 'no token was routed to 2 adapters of experts (base_model.model.experts.1.up_proj ...)' in caplog.text


@pytest.mark.parametrize(('used', 'named'), [((), 'experts.0.up_proj'), ((0, 1, 2, 3), 'head')])
def test_what_nothing_depends_on_ends_the_run(used: tuple[int, ...], named: str) -> None:
    model = trained(used, targets=['up_proj', 'head'])
    if named == 'head':
        for name, parameter in model.named_parameters():
            parameter.grad = None if 'head' in name else parameter.grad
    with pytest.raises(TrainingError, match=rf'no gradient for base_model.model.{named}'):
        check_gradients(model, step=0)
