"""Training and validation parts, and weights of sources."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.dataset.conftest import RECORDS
from xtuner.errors import DataError


def test_validation_is_apart_and_repeatable_and_equal_conversations_stay_together(prepare):
    records = RECORDS * 2
    train, val = prepare(records, val_ratio=0.2), prepare(records, val_ratio=0.2, part='val')
    texts = [{tuple(d.sample(n).input_ids.tolist()) for n in d.sample_numbers.tolist()} for d in (train, val)]
    assert len(texts[1]) == 12 and len(texts[0]) == 48 and not texts[0] & texts[1]
    assert sorted([*train.sample_numbers, *val.sample_numbers]) == list(range(120))
    assert prepare(part='val') is None


def test_sources_are_joined_and_weighted(prepare):
    (prepare.folder / 'b.jsonl').write_text('\n'.join(json.dumps({'input': f'{n}', 'output': 'b'}) for n in range(10)))
    prepare()
    a, b = str(prepare.folder / 'data.jsonl'), str(prepare.folder / 'b.jsonl')
    assert len(prepare(None, source=[a, b]).sample_numbers) == 70
    dataset = prepare(None, source=[{'path': a, 'weight': 0.5}, {'path': b, 'weight': 2.3, 'map_fn': 'default'}])
    counts = np.bincount(dataset.sample_numbers, minlength=70)
    assert counts[:60].sum() == 30 and set(counts[:60]) == {0, 1}
    assert counts[60:].sum() == 23 and set(counts[60:]) == {2, 3}
    assert dataset.summary.formats == {a: 'detected as gsm8k'}


@pytest.mark.parametrize('weight', [1e12, 1e300])
def test_a_weight_that_no_machine_could_serve_is_refused_at_once(prepare, weight):
    prepare()
    with pytest.raises(DataError, match=r'the weights of `dataset.source` ask for .* lower them'):
        prepare(None, source={'path': str(prepare.folder / 'data.jsonl'), 'weight': weight})
