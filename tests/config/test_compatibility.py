"""What goes with what: each rule refuses what it names, says the alternative, and the table in the docs is of today."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from tests.conftest import ROOT
from xtuner.config.compatibility import METHODS, RULES, STRATEGIES, Combination, broken_rule, check, table
from xtuner.config.deepspeed import read_deepspeed_config, shipped_deepspeed_configs, stage_of
from xtuner.config.load import load_config
from xtuner.engine.distributed import choose_strategy
from xtuner.errors import ConfigError


def choose(world_size: int, config: str = 'internlm_7b_qlora_oasst1', **options: object) -> str:
    overrides = {key.replace('__', '.'): value for key, value in options.items()}
    return choose_strategy(load_config(config, overrides), world_size)


def test_one_process_is_single_and_several_are_ddp() -> None:
    assert choose(1) == 'single'
    assert choose(2) == 'ddp'
    assert choose(2, parallel__strategy='fsdp') == 'fsdp'


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: ' '.join(rule.when))
def test_a_rule_refuses_each_of_its_combinations_and_says_what_instead(rule: object) -> None:
    for values in product(*rule.when.values()):  # type: ignore[attr-defined]
        chosen = {'method': 'lora', 'strategy': 'ddp'} | dict(zip(rule.when, values, strict=True))  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r'cannot be combined: .*; use '):
            check(Combination(**chosen))


def test_what_is_not_forbidden_goes() -> None:
    going = [c for c in (Combination(m, s) for m, s in product(METHODS, STRATEGIES)) if broken_rule(c) is None]
    assert (
        len(going) == len(METHODS) * len(STRATEGIES) - 4
    )  # ZeRO-3 of a quantised base or another adapter, and 8 bit under fsdp


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'parallel__strategy': 'deepspeed_zero3'}, '`fsdp`, which shards a 4-bit base'),
        ({'parallel__strategy': 'fsdp', 'quantization__bits': 8}, 'quantization.bits = 4'),
        ({'parallel__strategy': 'fsdp', 'model__dtype': 'fp16'}, 'bf16'),
        ({'parallel__strategy': 'fsdp', 'optimizer__type': 'bitsandbytes.optim:AdamW8bit'}, '32-bit'),
        ({'parallel__sequence_parallel_size': 2, 'runtime__fast': False}, 'runtime.fast = True'),
        ({'parallel__sequence_parallel_size': 3}, 'does not divide'),
        ({'parallel__strategy': 'single'}, 'use ddp or fsdp'),
        ({'parallel__strategy': 'deepspeed_zero4'}, "did you mean 'deepspeed_zero"),
        ({'parallel__strategy': 'fsdpp'}, "did you mean 'fsdp'"),
    ],
)
def test_what_a_user_sees(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose(2, **options)
    assert words in str(error.value)


def test_the_table_in_the_docs_is_made_from_the_rules() -> None:
    text = (ROOT / 'docs' / 'scale.md').read_text(encoding='utf-8')
    assert '\n'.join(table()) in text, 'run `python -m xtuner.config.compatibility` and put it into docs/scale.md'


def test_shipped_deepspeed_configs_are_read_and_do_not_overlap() -> None:
    assert set(shipped_deepspeed_configs()) >= {f'deepspeed_zero{n}' for n in (1, 2, 3)}
    for name in shipped_deepspeed_configs():
        content = read_deepspeed_config(name)
        assert content['zero_optimization']['overlap_comm'] is False
        assert stage_of(name) == name.removesuffix('_offload')


def test_a_user_s_deepspeed_file(tmp_path: Path) -> None:
    path = tmp_path / 'mine.json'
    path.write_text('{"fp16": {"enabled": true}, "train_batch_size": "auto", "zero_optimization": {"stage": 2}}')
    assert read_deepspeed_config(str(path)) == {'zero_optimization': {'stage': 2}}  # the rest is the run's own config
    assert stage_of(str(path)) == 'deepspeed_zero2'
    path.write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(ConfigError, match='must be 1, 2 or 3'):
        read_deepspeed_config(str(path))
