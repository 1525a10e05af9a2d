"""The samples that a run records for later comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.convert.adapters import VOCAB
from xtuner.dataset.probe import PROBE_FILE, read_probe, write_probe


@pytest.mark.parametrize('content', [
    '[]', '{', '{"part": "training", "samples": [{"input_ids": [5, 99999], "trained": [0, 1]}]}',
    '{"part": "training", "samples": [{"input_ids": [[5]], "trained": [[1]]}]}',
    '{"part": "training", "samples": [{"input_ids": [5, -1], "trained": [0, 1]}]}',
    '{"part": "training", "samples": [{"input_ids": ["a"], "trained": [1]}]}', '[' * 100_000, ' ' * 2**21,
])  # fmt: skip
def test_a_record_of_samples_that_is_none_is_passed_over(content: str, tmp_path: Path) -> None:
    (tmp_path / PROBE_FILE).write_text(content)
    assert read_probe(tmp_path, VOCAB) is None


def test_samples_are_recorded_one_by_one_and_once(tmp_path: Path) -> None:
    pack = {'input_ids': torch.arange(6), 'labels': torch.tensor([-100, 1, 2, -100, -100, -100]),
            'position_ids': torch.tensor([0, 1, 2, 0, 1, 2])}  # fmt: skip
    write_probe(tmp_path, [pack], 'validation')
    write_probe(tmp_path, [], 'training')
    probe = read_probe(tmp_path, 10)
    assert probe is not None
    assert probe.part == 'validation'
    assert [(ids.tolist(), trained.tolist()) for ids, trained in probe.samples] == [([0, 1, 2], [False, True, True])]
