"""Which configs are known to mix the samples of a pack, and from which length on."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from xtuner.model.families.internlm.configuration import InternLMConfig
from xtuner.model.families.packing import MIXING_TYPES, packing_unsupported_reason, rope_trained_length

LONGROPE = {'rope_type': 'longrope', 'rope_theta': 1e4, 'short_factor': [1.0] * 48, 'long_factor': [4.0] * 48}


@pytest.mark.parametrize('kind', ['bloom', 'falcon', 'gpt_oss', 'mamba2', 'qwen3_next'])
def test_a_type_that_mixes_samples_does_so_at_any_length(kind: str) -> None:
    reason = packing_unsupported_reason(CONFIG_MAPPING[kind](), 16)
    assert reason == f'in a model of type {kind!r} the samples of a pack see each other'


def test_of_a_composite_config_the_text_model_counts() -> None:
    assert "'qwen3_5_text' the samples of a pack see each other" in str(
        packing_unsupported_reason(CONFIG_MAPPING['qwen3_5'](), 16)
    )


@pytest.mark.parametrize('kind', ['gemma2', 'gemma3', 'llama', 'mistral', 'phi3', 'qwen3'])
def test_windows_keep_samples_apart(kind: str) -> None:
    assert packing_unsupported_reason(CONFIG_MAPPING[kind](), 10**6) is None


def test_chunks_are_counted_from_the_start_of_a_pack() -> None:
    config = CONFIG_MAPPING['llama4']()
    assert packing_unsupported_reason(config, 8192) is None
    reason = str(packing_unsupported_reason(config, 8193))
    assert '`attention_chunk_size` is 8192' in reason and 'dataset.max_length=8192 would keep packing' in reason


@pytest.mark.parametrize(
    ('config', 'length'),
    [
        (CONFIG_MAPPING['phi3'](rope_parameters=LONGROPE | {'original_max_position_embeddings': 4096}), 4096),
        (CONFIG_MAPPING['llama'](rope_parameters={'rope_type': 'dynamic', 'factor': 2.0}), 2048),
        (CONFIG_MAPPING['llama'](rope_parameters={'rope_type': 'linear', 'factor': 2.0}), None),
        (CONFIG_MAPPING['llama'](), None),
        (InternLMConfig(rotary={'base': 10000, 'type': 'dynamic'}, max_position_embeddings=512), 512),
        (InternLMConfig(rotary={'base': 10000, 'type': 'origin'}, max_position_embeddings=512), None),
    ],
)
def test_the_length_beyond_which_rotary_angles_depend_on_the_longest_sample(config: Any, length: int | None) -> None:
    assert rope_trained_length(config) == length
    assert packing_unsupported_reason(config, length or 10**6) is None
    if length:
        assert f'one sample of more than {length} tokens' in str(packing_unsupported_reason(config, length + 1))


def test_angles_of_one_kind_of_layer_count() -> None:
    config = CONFIG_MAPPING['gemma3_text']()
    nested = {name: dict(value) for name, value in config.rope_parameters.items()}
    nested['full_attention'] = {'rope_type': 'longrope', 'original_max_position_embeddings': 1024}
    config.rope_parameters = nested
    assert rope_trained_length(config) == 1024


def test_the_table_names_types_that_there_are() -> None:
    assert set(CONFIG_MAPPING.keys()) >= MIXING_TYPES
