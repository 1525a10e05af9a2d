"""Values of a config, checked against their declarations."""

from __future__ import annotations

import pytest

from tests.config.test_load import FLAGSHIP
from xtuner.config.load import load_config
from xtuner.config.schema import TrainConfig
from xtuner.errors import ConfigError

pytestmark = pytest.mark.unit


@pytest.mark.torch
@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('dataset.max_lenght', 512, "unknown key `dataset.max_lenght`; did you mean 'max_length'"),
        ('schedul.max_epochs', 1, "unknown key `schedul`; did you mean 'schedule'"),
        ('nonsense', 1, 'unknown key `nonsense`; known: model, dataset'),
        ('schedule.batch_size', 0, '`schedule.batch_size` must be at least 1, got 0'),
        ('schedule.batch_size', 'two', "`schedule.batch_size` must be a whole number, got 'two'"),
        ('schedule.batch_size', True, '`schedule.batch_size` must be a whole number, got True'),
        ('schedule.decay', 'cosin', "`schedule.decay` must be one of 'cosine', 'linear', 'constant', got 'cosin'"),
        ('quantization.bits', 5, '`quantization.bits` must be one of 4, 8, got 5'),
        ('log.trackers', ['tensorbord'], '`log.trackers` must be one of'),
        ('model', 3, '`model` must be a dict, got 3'),
        ('model.path.x', 3, '`model.path.x` cannot be set: `path` is a str'),
        ('adapter', None, '`quantization` needs an `adapter`'),
        ('adapter.r', 0, '`adapter.r` must be at least 1, got 0'),
        ('adapter.r', 'eight', "`adapter.r` must be a whole number, got 'eight'"),
        ('adapter.r', 10**10, '`adapter.r` must be at most 65536, got 10000000000'),
        ('adapter.target_modules', '[', '`adapter.target_modules` is not a regular expression (unterminated character'),
        ('adapter.lora_alpha', float('nan'), '`adapter.lora_alpha` must be a finite number'),
        ('optimizer.lr', None, '`optimizer.lr` needs a number, got None'),
        ('optimizer.lr', 'nan', "`optimizer.lr` must be a number, got 'nan'"),
        ('optimizer.lr', float('nan'), '`optimizer.lr` must be a finite number, got nan'),
        ('optimizer.lr', 1e300, '`optimizer.lr` must be at most 1000000000, got 1e+300'),
        ('optimizer.lr', -1.0, '`optimizer.lr` must be at least 0, got -1.0'),
        ('optimizer.weight_decay', 'inf', "`optimizer.weight_decay` must be a number, got 'inf'"),
        ('optimizer.betas', (0.9, float('nan')), '`optimizer.betas` must be a finite number'),
        ('runtime.num_workers', 100000, '`runtime.num_workers` must be at most'),
        ('schedule.batch_size', 10**12, '`schedule.batch_size` must be at most 65536'),
        ('schedule.accumulative_counts', 10**12, '`schedule.accumulative_counts` must be at most 65536'),
        ('dataset.max_length', 10**12, '`dataset.max_length` must be at most 16777216'),
        ('dataset.max_length', 'x' * 10**5, '`dataset.max_length` must be a whole number, got'),
        ('parallel.timeout_s', 1e300, '`parallel.timeout_s` must be at most'),
        ('optimizer', {}, '`optimizer` needs a `type`'),
    ],
)
def test_a_wrong_value_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(FLAGSHIP, {key: value})
    assert message in str(caught.value)


def test_names_of_modules_and_texts_may_look_like_numbers() -> None:
    names = {'target_modules': ['0', '2'], 'exclude_modules': '1', 'prompt_tuning_init_text': '2024'}
    assert load_config(FLAGSHIP, {f'adapter.{key}': value for key, value in names.items()}).adapter is not None


def test_a_config_is_made_of_checked_classes() -> None:
    assert isinstance(load_config(FLAGSHIP), TrainConfig)
