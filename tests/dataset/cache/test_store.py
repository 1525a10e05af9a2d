"""Prepared data on disk."""

from __future__ import annotations

import pickle

import torch


def test_a_data_set_goes_to_a_worker_as_its_path(prepare):
    dataset = prepare()
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(pickle.dumps(dataset)) < 1000
    assert all(torch.equal(copy[3][name], value) for name, value in dataset[3].items())


def test_a_torn_folder_is_prepared_again(prepare):
    dataset = prepare()
    expected = dataset[0]['input_ids']
    with (dataset.folder / 'ids.bin').open('r+b') as file:
        file.truncate(100)
    assert torch.equal(prepare()[0]['input_ids'], expected)


def test_origins_are_found_without_reading_all(prepare, monkeypatch):
    dataset = prepare()
    found = [origin for index in range(len(dataset)) for origin in dataset.origins(index)]
    assert sorted(found, key=lambda origin: int(origin.rsplit(':')[-1])) == [
        f'{prepare.folder / "data.jsonl"}:{line}' for line in range(1, 61)
    ]
    assert dataset.origins(0) == sorted(dataset.origins(0), key=lambda origin: int(origin.rsplit(':')[-1]))
