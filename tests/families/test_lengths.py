"""Rotary angles that depend on the longest sample of a batch: packs are right up to the named length, wrong beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families.small import small_config
from tests.families.sweep import LENGTHS, own_loss, packed_loss
from xtuner.model.families.packing import packing_unsupported_reason
from xtuner.objectives.sft import SupervisedFinetune

LONGROPE = {'rope_type': 'longrope', 'rope_theta': 1e4, 'short_factor': [1.0] * 8, 'long_factor': [16.0] * 8}


def model_of(kind: str, length: int) -> Any:
    """A small model whose rotary angles change beyond a length."""
    torch.manual_seed(0)
    config = small_config(kind)
    if kind == 'phi3':
        config.rope_parameters = LONGROPE | {'original_max_position_embeddings': length}
        config.original_max_position_embeddings = length
    else:
        config.rope_parameters = {'rope_type': 'dynamic', 'rope_theta': 1e4, 'factor': 4.0}
        config.max_position_embeddings = length
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize('kind', ['llama', 'phi3'])
def test_packs_are_right_up_to_the_length_and_switched_off_beyond(kind: str) -> None:
    longest, shortest = max(LENGTHS), min(LENGTHS)
    for length in (longest, shortest):
        llm = model_of(kind, length)
        assert (packing_unsupported_reason(llm.config, longest) is None) is (length == longest)
        with torch.no_grad():
            packed, alone = packed_loss(SupervisedFinetune(llm).eval()).item(), own_loss(model_of(kind, length)).item()
        assert (packed == pytest.approx(alone, rel=1e-5)) is (length == longest)
