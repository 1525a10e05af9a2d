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
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.templates.builtin import get_template

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


_SCALE = """
import json, resource, sys, time
from tests.dataset.conftest import make_tokenizer
from xtuner.config.schema import DatasetConfig
from xtuner.dataset.prepare import prepare_dataset
from xtuner.dataset.templates.builtin import get_template

tokenizer = make_tokenizer(['<eoh>', '<eoa>'])
template = get_template('internlm_chat', tokenizer)
for count in map(int, sys.argv[2:]):
    path = f'{sys.argv[1]}/{count}.jsonl'
    with open(path, 'w') as file:
        for n in range(count):
            file.write(json.dumps({'id': n, 'question': f'Are you {n}?', 'answer': 'I am.'}) + '\\n')
    config = DatasetConfig(source=path, max_length=512, cache_dir=sys.argv[1])
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        dataset = prepare_dataset(config, tokenizer=tokenizer, template=template)
        seconds.append(round(time.monotonic() - start, 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps([dataset.summary.kept, peak, dataset.origins(len(dataset) - 1)[-1], seconds]))
"""


@pytest.mark.parametrize(
    ('small', 'large'),
    [(10_000, 100_000), pytest.param(100_000, 1_000_000, marks=pytest.mark.slow)],
)
def test_a_record_more_takes_some_numbers_of_memory_and_not_its_text(tmp_path, small, large):
    """Per record: its length, place, hash and pack, and the hash of its id; the tokens go to the disk.

    A million took 395 s and 431 MiB on two cores that fourteen processes shared (137 bytes a record beyond the first
    100,000); a conversation held as objects would be 2 KiB each.
    """
    command = [sys.executable, '-c', _SCALE, str(tmp_path), str(small), str(large)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    (kept_small, peak_small, _, _), (kept_large, peak_large, origin, seconds) = map(json.loads, lines)
    print('seconds:', seconds, 'peak MiB:', peak_large >> 20, 'bytes a record:', (peak_large - peak_small) // large)
    assert (kept_small, kept_large) == (small, large)
    assert int(origin.rpartition(':')[2]) <= large
    assert peak_large - peak_small < 300 * (large - small)
    assert seconds[1] < seconds[0] / 4
