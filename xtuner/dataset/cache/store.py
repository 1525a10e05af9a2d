"""Prepared data on disk: flat memory-mapped arrays of token ids, and which samples share a pack.

ids.bin          int32 (T,)      token ids of all samples, concatenated
trained.bin      bool  (T,)      which tokens are trained
offsets.npy      int64 (N + 1,)  where each sample begins
hashes.npy       uint64 (N,)     content hash of each sample, to find duplicates in other data
origins.txt      N lines         where each sample came from
origin_starts.npy  int64 (N + 1,)  byte offset of each line of origins.txt
train_samples.npy, train_starts.npy, val_...   the packs of each part (see `Packs`)
meta.json        the summary, a hash of ids and trained, and the file sizes that reveal an incomplete folder
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX, Sample
from xtuner.dataset.packing.pack import Packs
from xtuner.dataset.packing.split import content_hash
from xtuner.dataset.summary import Summary
from xtuner.errors import DataError

_META, _ORIGINS = 'meta.json', 'origins.txt'


class StoreWriter:
    """Writes samples into a folder as they arrive; `finish` adds the packs and marks the folder complete."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._ids = (folder / 'ids.bin').open('wb')
        self._trained = (folder / 'trained.bin').open('wb')
        self._origins = (folder / _ORIGINS).open('wb')
        self._offsets = array('q', [0])
        self._origin_starts = array('q', [0])
        self._hashes = array('Q')
        self._digests = [hashlib.blake2b(digest_size=16) for _ in range(2)]

    def append(self, samples: Sequence[Sample], origins: Sequence[str]) -> None:
        """Appends samples; `origins` says where each one came from."""
        if not samples:
            return
        ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int32)
        trained = np.concatenate([sample.labels for sample in samples]) != IGNORE_INDEX
        for file, digest, content in zip((self._ids, self._trained), self._digests, (ids, trained), strict=True):
            file.write(content.tobytes())
            digest.update(content.tobytes())
        lines = [f'{_without_line_breaks(origin)}\n'.encode('utf-8', 'surrogateescape') for origin in origins]
        self._origins.writelines(lines)
        self._origin_starts.extend(accumulate(map(len, lines), initial=self._origin_starts.pop()))
        self._hashes.extend(map(content_hash, samples))
        ends = np.cumsum([len(sample.input_ids) for sample in samples]) + self._offsets[-1]
        self._offsets.extend(ends.tolist())

    @property
    def num_samples(self) -> int:
        """Number of samples written so far."""
        return len(self._offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Length of each sample so far in tokens, int64 `(N,)`."""
        return np.diff(np.array(self._offsets, dtype=np.int64))

    @property
    def hashes(self) -> np.ndarray:
        """Content hash of each sample so far, uint64 `(N,)`."""
        return np.array(self._hashes, dtype=np.uint64)

    def close(self) -> None:
        """Closes the files; without `finish` the folder stays incomplete."""
        self._ids.close()
        self._trained.close()
        self._origins.close()

    def finish(self, parts: dict[str, Packs], summary: Summary) -> None:
        """Writes the packs and, last, the metadata that marks the folder complete."""
        self.close()
        np.save(self.folder / 'offsets.npy', np.array(self._offsets, dtype=np.int64))
        np.save(self.folder / 'origin_starts.npy', np.array(self._origin_starts, dtype=np.int64))
        np.save(self.folder / 'hashes.npy', self.hashes)
        for part, packs in parts.items():
            np.save(self.folder / f'{part}_samples.npy', packs.samples)
            np.save(self.folder / f'{part}_starts.npy', packs.starts)
        sizes = {file.name: file.stat().st_size for file in self.folder.iterdir()}
        content = ' '.join(digest.hexdigest() for digest in self._digests)
        meta = {'sizes': sizes, 'content': content, 'summary': summary.to_dict()}
        (self.folder / _META).write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding='utf-8')


def _without_line_breaks(text: str) -> str:
    return text.replace('\n', ' ').replace('\r', ' ')


def _line_at(file: BinaryIO, start: int) -> str:
    file.seek(start)
    return file.readline().decode('utf-8', 'surrogateescape').rstrip('\n')


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds prepared data and every file has the size recorded for it."""
    try:
        sizes = json.loads((folder / _META).read_text(encoding='utf-8'))['sizes']
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def join_samples(samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """Returns a pack: `input_ids`, `labels` and `position_ids`, int64 `(S,)`, positions from 0 in each sample."""
    return {
        'input_ids': torch.from_numpy(np.concatenate([sample.input_ids for sample in samples])),
        'labels': torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
        'position_ids': torch.from_numpy(np.concatenate([np.arange(len(sample.input_ids)) for sample in samples])),
    }


class PreparedDataset(Dataset):
    """Packs of a prepared folder, read from disk on access.

    `dataset[i]` is a dict of `input_ids`, `labels` and `position_ids`, int64 tensors `(S,)`; positions restart at 0
    with each sample of the pack.

    Attributes:
        lengths: Length of each pack in tokens, int64 `(len(self),)`, available without loading a pack.
        summary: Counts of records kept, dropped and truncated.
        hashes: Content hash of each conversation of both parts, by number, uint64 `(N,)`.
    """

    def __init__(self, folder: Path, part: str = 'train') -> None:
        self.folder = Path(folder)
        self.part = part
        self._open()

    def _open(self) -> None:
        try:
            self._read()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f'{self.folder}: prepared data is damaged ({error}); remove this folder to prepare it again'
            ) from error

    def _read(self) -> None:
        meta = json.loads((self.folder / _META).read_text(encoding='utf-8'))
        self.summary = Summary.from_dict(meta['summary'])
        self._content: str = meta['content']
        self._ids = np.memmap(self.folder / 'ids.bin', dtype=np.int32, mode='r')
        self._trained = np.memmap(self.folder / 'trained.bin', dtype=np.bool_, mode='r')
        self._offsets = np.load(self.folder / 'offsets.npy', mmap_mode='r')
        self._origin_starts = np.load(self.folder / 'origin_starts.npy', mmap_mode='r')
        self.hashes = np.load(self.folder / 'hashes.npy', mmap_mode='r')
        self._packs = Packs(*(np.load(self.folder / f'{self.part}_{name}.npy', mmap_mode='r')
                              for name in ('samples', 'starts')))  # fmt: skip
        self.lengths = self._packs.lengths(np.diff(self._offsets))

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for a data set of {len(self)} items')
        return join_samples([self.sample(int(number)) for number in self._packs[index % len(self)]])

    def sample(self, number: int) -> Sample:
        """Returns one conversation by number, independent of its pack."""
        start, end = self._offsets[number : number + 2]
        ids = self._ids[start:end].astype(np.int64)
        return Sample(ids, np.where(self._trained[start:end], ids, IGNORE_INDEX))

    @property
    def sample_lengths(self) -> np.ndarray:
        """Length in tokens of each conversation of both parts, by number, int64 `(N,)`."""
        return np.diff(self._offsets)

    @property
    def sample_numbers(self) -> np.ndarray:
        """Conversation numbers of this part in pack order, int64 `(N,)`."""
        return np.asarray(self._packs.samples)

    @property
    def num_samples(self) -> int:
        """Number of conversations in both parts."""
        return len(self._offsets) - 1

    def origins(self, index: int) -> list[str]:
        """Returns the origins, such as 'file:line', of the conversations in a pack, in data order."""
        numbers = np.unique(self._packs[index])
        with (self.folder / _ORIGINS).open('rb') as file:
            return [_line_at(file, start) for start in self._origin_starts[numbers].tolist()]

    @property
    def digest(self) -> str:
        """Hash of this part's ids, trained mask and packs; independent of where the data came from."""
        digest = hashlib.blake2b(self._content.encode(), digest_size=16)
        for part in (self._packs.samples, self._packs.starts, self._offsets):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def packing_efficiency(self, max_length: int) -> float:
        """Average share of `max_length` that a pack fills, 0 to 1."""
        return float(self.lengths.mean() / max_length) if len(self) else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {'folder': self.folder, 'part': self.part}  # a worker process maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state['folder'], state['part'])  # type: ignore[misc]
