"""DeepSpeed's ZeRO on two ranks: the weights of one process, and checkpoints that others go on with.

Needs DeepSpeed (`pip install 'xtuner[deepspeed]'`), which compiles a small library when it first runs on a CPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.faults.lives import Life
from tests.faults.lives import words_for as life_words
from tests.faults.test_ranks import STEADY, assert_same_weights, uninterrupted
from xtuner.config.load import load_config
from xtuner.engine.distributed import make_strategy
from xtuner.errors import ConfigError


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    config = load_config('internlm_7b_qlora_oasst1', {'parallel.strategy': 'deepspeed_zero2'})
    with pytest.raises(ConfigError, match=r"pip install 'xtuner\[deepspeed\]'"):
        make_strategy(config, 'deepspeed_zero2', 0, 2)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('deepspeed') is None, reason='DeepSpeed is an optional extra')
@pytest.mark.parametrize('stage', [1, 2, 3])
def test_two_ranks_of_zero_go_on_and_are_gone_on_with(
    stage: int, tiny_internlm: Path, forty_conversations: Path, tmp_path: Path
) -> None:
    """A step by `ddp`, two by ZeRO, which saves after each and is started anew in between, one by one process."""
    folder, log = tmp_path / 'run', tmp_path / 'log'
    zero = f'deepspeed_zero{stage}'
    options = [*STEADY, *(['quantization=None'] if stage == 3 else [])]
    for steps, ranks, strategy in ((1, 2, 'ddp'), (2, 2, zero), (3, 2, zero), (4, 1, 'auto')):
        words = life_words(tiny_internlm, forty_conversations, folder, *options, steps=steps)
        more = [f'schedule.accumulative_counts={4 // ranks}', f'parallel.strategy={strategy}', '--allow-changes']
        assert set(Life([*words, *more], log, ranks=ranks).end(300)) == {0}, log.read_text(encoding='utf-8')[-4000:]
    assert_same_weights(folder, uninterrupted(tiny_internlm, forty_conversations, tmp_path, *options))
