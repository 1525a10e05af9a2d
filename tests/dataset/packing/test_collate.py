from __future__ import annotations

import numpy as np
import torch

from xtuner.dataset.packing.collate import collate


def item(ids, labels=None, positions=None):
    ids = np.array(ids)
    return {'input_ids': ids, 'labels': np.array(labels if labels is not None else ids),
            'position_ids': np.array(positions if positions is not None else range(len(ids)))}  # fmt: skip


def test_padding_is_a_sample_of_its_own_without_targets():
    batch = collate([item([1, 2, 3, 4, 5], [-100, 2, -100, -100, 5], [0, 1, 0, 1, 2]), item([6, 7])], pad_id=9)
    assert batch['input_ids'].tolist() == [[1, 2, 3, 4, 5], [6, 7, 9, 9, 9]]
    assert batch['labels'].tolist() == [[-100, 2, -100, -100, 5], [6, 7, -100, -100, -100]]
    assert batch['position_ids'].tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_rows_fill_up_to_a_multiple():
    for length, expected in ((1, 8), (8, 8), (9, 16)):
        batch = collate([item(range(length))], pad_id=0, multiple_of=8)
        assert batch['input_ids'].shape == (1, expected)
        assert batch['position_ids'][0, length:].tolist() == list(range(expected - length))


def test_tensors_are_taken_like_arrays():
    arrays = item([1, 2, 3])
    tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
    for name, value in collate([arrays], pad_id=0).items():
        assert torch.equal(value, collate([tensors], pad_id=0)[name])
