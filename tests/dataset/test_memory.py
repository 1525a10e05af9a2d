"""The preparation's memory does not grow with the data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

_PREPARE = """
import resource, sys
from tests.dataset.conftest import make_tokenizer
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.pipeline import prepare_dataset
from xtuner.dataset.template import get_template

tokenizer = make_tokenizer(['<eoh>', '<eoa>'])
config = DatasetConfig(source=sys.argv[1], max_length=512, cache_dir=sys.argv[2])
prepare_dataset(config, tokenizer=tokenizer, template=get_template('internlm_chat', tokenizer))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize('form', ['jsonl', 'json'])
def test_ten_times_the_data_takes_less_than_a_fifth_more_memory(tmp_path, form):
    rows = [{'question': f'How are you? {n} ' * 5, 'answer': f'I am fine, thank you. {n} ' * 10} for n in range(6000)]
    peaks = []
    for times in (1, 10):
        path = tmp_path / f'{times}.{form}'
        text = '\n'.join(map(json.dumps, rows * times)) if form == 'jsonl' else json.dumps(rows * times)
        path.write_text(text)
        command = [sys.executable, '-c', _PREPARE, str(path), str(tmp_path / f'cache{times}')]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1.2 * peaks[0]
