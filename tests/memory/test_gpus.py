"""GPUs by name, and the work of a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_estimate import FLAGSHIP
from xtuner.config.load import load_config
from xtuner.engine.estimate import dims_of, setup_of
from xtuner.errors import UsageError
from xtuner.memory.gpus import find_gpu, flops_per_token


def test_flops_are_those_of_the_notes(folder_7b: Path) -> None:
    """30.5 GFLOP a token without recomputation, in benchmarks/notes_qlora_step.md."""
    config = load_config(FLAGSHIP, {'runtime.activation_checkpointing': False})
    assert flops_per_token(setup_of(config, dims_of(config, folder_7b))) == pytest.approx(30.5e9, rel=0.01)


def test_cards_by_name() -> None:
    assert find_gpu('RTX 4090').gib == 24
    with pytest.raises(UsageError, match=r'unknown GPU .h10.; known: .*; did you mean .*h100.*\?$'):
        find_gpu('h10')
