from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

from xtuner.config.schema import DatasetConfig, ModelConfig, ScheduleConfig, TrainConfig
from xtuner.dataset.sources.readers import Record
from xtuner.dataset.sources.source import Source
from xtuner.dataset.stream import PackStream
from xtuner.dataset.templates.builtin import get_template
from xtuner.engine.batches import MicroBatches, make_plan
from xtuner.errors import ConfigError, DataError

RECORDS = [{'question': 'Hi ' * (n % 7 + 1), 'answer': f'I am {n}.'} for n in range(100)]


@pytest.fixture
def stream(tmp_path, internlm_like):
    (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, RECORDS)))

    def make(*, source=None, val_ratio=0.0, on_bad_record='error', **options):
        source = source or str(tmp_path / 'data.jsonl')
        config = DatasetConfig(source=source, max_length=128, val_ratio=val_ratio, on_bad_record=on_bad_record)
        return PackStream(config, tokenizer=internlm_like, template=get_template('internlm_chat'), **options)

    return make


@pytest.mark.parametrize('window', [1, 30, 1000])
def test_every_target_comes_once(stream, window):
    found = stream(window=window)
    packs = list(found)
    assert sum(int((pack['labels'] != -100).sum()) for pack in packs) == found.summary.target_tokens > 0
    assert sum(int((pack['position_ids'] == 0).sum()) for pack in packs) == found.summary.kept == 100
    assert max(len(pack['input_ids']) for pack in packs) <= 128


def test_ranks_take_turns_and_a_resumed_run_goes_on(stream):
    everything = [pack['input_ids'].tolist() for pack in stream(window=30)]
    ranks = [[pack['input_ids'].tolist() for pack in stream(window=30, rank=rank, world_size=2)] for rank in (0, 1)]
    assert ranks == [everything[0::2], everything[1::2]]
    rest = [pack['input_ids'].tolist() for pack in stream(window=30, rank=1, world_size=2, skip=3)]
    assert rest == ranks[1][3:]


def test_workers_share_the_packs(stream):
    loader = torch.utils.data.DataLoader(stream(window=30), batch_size=None, num_workers=2)
    found = sorted(item['input_ids'].tolist() for item in loader)
    assert found == sorted(pack['input_ids'].tolist() for pack in stream(window=30))


def test_data_that_never_ends_is_read_only_as_far_as_needed(stream):
    read = itertools.count()

    def endless():
        return (Record(f'endless[{n}]', RECORDS[n % 100]) for n in read)

    found = stream(window=64)
    found.sources = [Source('endless', endless, str)]
    assert len(list(itertools.islice(found, 50))) == 50
    assert next(read) < 5000


def test_what_needs_the_whole_data_is_refused(stream, tmp_path):
    with pytest.raises(ConfigError, match='a stream supports neither `val_ratio` nor `weight`'):
        stream(val_ratio=0.1)
    with pytest.raises(ConfigError, match='a stream supports neither'):
        stream(source={'path': str(tmp_path / 'data.jsonl'), 'weight': 2})


@pytest.mark.parametrize(('records', 'reason'), [
    (RECORDS[:1], 'yields 1 pack, too few for 2 groups of processes x 1 readers to have one each'),
    ([], 'contains no conversation; 0 records'),
    ([{'question': 'Hi', 'answer': ''}], '1 could not be used'),
])  # fmt: skip
def test_a_rank_that_finds_no_pack_says_why(stream, tmp_path, records, reason):
    (tmp_path / 'few.jsonl').write_text('\n'.join(map(json.dumps, records)))
    found = stream(source=str(tmp_path / 'few.jsonl'), rank=1, world_size=2, on_bad_record='skip')
    schedule = ScheduleConfig(max_steps=2, accumulative_counts=1)
    config = TrainConfig(model=ModelConfig(path='', template=''), dataset=found.config, optimizer={}, schedule=schedule)
    batches = MicroBatches(found, config, make_plan(found, config, 2), pad_id=0, rank=1)
    with pytest.raises(DataError, match=re.escape(reason)):
        next(iter(batches))
