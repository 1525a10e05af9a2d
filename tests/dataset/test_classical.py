"""The names that classical configs import lead to the same rooms."""

from __future__ import annotations

import json

import pytest
import torch

from xtuner.dataset import ConcatDataset, MOSSSFTDataset, process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import alpaca_map_fn, template_map_fn_factory
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.dataset.templates.builtin import get_template
from xtuner.errors import ConfigError
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

ROWS = [{'instruction': f'Say {n}', 'input': '', 'output': f'I say {n}. ' * (n % 4 + 1), 'other': n} for n in range(40)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv('XTUNER_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def classical(tmp_path, internlm_like):
    """The `train_dataset` dict of a classical config."""
    datasets = pytest.importorskip('datasets')
    (tmp_path / 'data.json').write_text(json.dumps(ROWS))
    load = {'type': datasets.load_dataset, 'path': 'json', 'data_files': {'train': str(tmp_path / 'data.json')},
            'cache_dir': str(tmp_path / 'hf')}  # fmt: skip
    template = {'type': template_map_fn_factory, 'template': PROMPT_TEMPLATE.internlm_chat}
    return {'dataset': load, 'tokenizer': internlm_like, 'max_length': 128, 'dataset_map_fn': alpaca_map_fn,
            'template_map_fn': template, 'remove_unused_columns': True, 'shuffle_before_pack': True,
            'pack_to_max_length': True, 'use_varlen_attn': False}  # fmt: skip


def test_a_classical_data_set_gives_packs(classical, internlm_like):
    dataset = process_hf_dataset(**classical)
    assert dataset.summary.kept == 40 and max(dataset.lengths) <= 128
    text = internlm_like.decode(dataset[0]['input_ids'])
    assert text.startswith('<s><|User|>:Say ') and '<eoh>\n<|Bot|>:I say ' in text
    batch = default_collate_fn([dataset[0], dataset[1]])['data']
    assert batch['input_ids'].shape == batch['labels'].shape
    assert torch.equal(default_collate_fn([dataset[0]], return_hf_format=True)['labels'][0], dataset[0]['labels'])


def test_options_that_change_something_do(classical):
    assert len(process_hf_dataset(**{**classical, 'pack_to_max_length': False})) == 40
    assert process_hf_dataset(**{**classical, 'max_dataset_length': 7}).summary.kept == 7
    renamed = process_hf_dataset(**{**classical, 'rename_maps': [{'old': 'other', 'new': 'extra'}]})
    assert renamed.summary.kept == 40
    with pytest.raises(ConfigError, match='for images'):
        process_hf_dataset(**{**classical, 'with_image_token': True})


def test_data_sets_are_joined(classical):
    build = {'type': process_hf_dataset, **classical}
    joined = ConcatDataset([build, build])
    assert len(joined) == 2 * len(process_hf_dataset(**classical)) == len(joined.lengths)
    sampler = LengthGroupedSampler(joined, per_device_batch_size=2, seed=1)
    assert sorted(sampler) == list(range(len(joined)))
    with pytest.raises(ValueError, match="must be 'length'"):
        LengthGroupedSampler(joined, 2, length_property='size')


def test_moss_is_read_with_its_own_template(tmp_path, tokenizer):
    turn = {'Human': '<|Human|>: hi<eoh>\n', 'Inner Thoughts': '<|Inner Thoughts|>: None<eot>\n',
            'Commands': '<|Commands|>: None<eoc>\n', 'Tool Responses': '<|Results|>: None<eor>\n',
            'MOSS': '<|MOSS|>: yes<eom>\n'}  # fmt: skip
    (tmp_path / 'moss.jsonl').write_text(json.dumps({'meta_instruction': 'Be MOSS.', 'chat': {'turn_1': turn}}))
    dataset = MOSSSFTDataset(tmp_path / 'moss.jsonl', tokenizer, max_length=256)
    item = dataset[0]
    assert len(dataset) == 1 and tokenizer.decode(item['input_ids']).startswith('Be MOSS.\n<|Human|>: hi<eoh>\n')
    assert '<|Results|>' not in tokenizer.decode(item['labels'][item['labels'] != -100])
    with pytest.raises(ConfigError, match='`bot_name`'):
        MOSSSFTDataset(tmp_path / 'moss.jsonl', tokenizer, bot_name='X')


def test_templates_are_found_by_attribute_and_by_key():
    assert PROMPT_TEMPLATE.internlm_chat is PROMPT_TEMPLATE['internlm_chat'] is get_template('internlm_chat')
    assert 'internlm2_chat' in PROMPT_TEMPLATE and 'alpaca' in SYSTEM_TEMPLATE
    assert SYSTEM_TEMPLATE.alpaca.endswith('\n')
    with pytest.raises(AttributeError, match="no prompt template 'internlm'; known: alpaca"):
        _ = PROMPT_TEMPLATE.internlm
    with pytest.raises(KeyError, match='no system template'):
        SYSTEM_TEMPLATE['nobody']
