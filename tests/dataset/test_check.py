"""Checking data without preparing it."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.dataset.conftest import RECORDS
from tests.dataset.test_prepare import BAD
from xtuner.dataset.check import check_dataset


def test_checking_collects_every_fault(prepare):
    prepare()
    (prepare.folder / 'bad.jsonl').write_bytes(b'\n'.join([json.dumps(RECORDS[0]).encode(), *BAD]))
    config = replace(prepare.config, source=str(prepare.folder / 'bad.jsonl'), on_long='error')
    summary = check_dataset(config, tokenizer=prepare.tokenizer, template=prepare.template)
    assert summary.counts['bad'] == len(BAD) and summary.kept == 1
    assert [example.split('bad.jsonl:')[1].split(':')[0] for example in summary.examples['bad']] == list('234567')
