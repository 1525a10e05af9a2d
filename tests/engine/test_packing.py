"""Packing is switched off, with a word, before data is prepared for a model that mixes the samples of a pack."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from xtuner.config.schema import DatasetConfig, ModelConfig, TrainConfig
from xtuner.engine.packing import with_supported_packing


def make_config() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(path='m', template='internlm_chat'),
        dataset=DatasetConfig(source='d.jsonl', packing='best_fit'),
        optimizer={'type': 'AdamW', 'lr': 1e-3},
    )


def checkpoint(folder: Path, packing: str) -> Path:
    (folder / 'run.json').write_text(json.dumps({'run': {'dataset.packing': packing}}), encoding='utf-8')
    return folder


def test_it_is_switched_off_for_a_model_that_mixes_samples(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config()
    with caplog.at_level(logging.WARNING, logger='xtuner'):
        assert with_supported_packing(config, AutoConfig.for_model('llama')) is config and not caplog.text
        changed = with_supported_packing(config, AutoConfig.for_model('bloom'))
    assert changed == replace(config, dataset=replace(config.dataset, packing='none'))
    [line] = caplog.messages
    assert line.startswith("`dataset.packing` is 'best_fit', and in a model of type 'bloom' the samples of a pack see")
    assert with_supported_packing(changed, AutoConfig.for_model('bloom')) is changed


def test_a_run_that_began_packed_stays_packed(tmp_path: Path) -> None:
    config, bloom = make_config(), AutoConfig.for_model('bloom')
    began_packed, began_unpacked = (tmp_path / name for name in ('packed', 'unpacked'))
    for folder, packing in ((began_packed, 'best_fit'), (began_unpacked, 'none')):
        folder.mkdir()
        checkpoint(folder, packing)
    assert with_supported_packing(config, bloom, checkpoint=began_packed) is config
    assert with_supported_packing(config, bloom, checkpoint=began_unpacked).dataset.packing == 'none'
    (began_packed / 'run.json').unlink()
    assert with_supported_packing(config, bloom, checkpoint=began_packed).dataset.packing == 'none'
