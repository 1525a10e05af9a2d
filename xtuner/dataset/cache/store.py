"""Prepared data on disk: flat arrays of ids, read by memory map, and plans of which samples share a pack.

ids.bin          int32 (T,)      all samples' ids, one behind the other
trained.bin      bool  (T,)      which of them are trained
offsets.npy      int64 (N + 1,)  where each sample begins
hashes.npy       uint64 (N,)     of each sample's content, to find equal ones in other data
origins.txt      N lines         where each sample came from
origin_starts.npy  int64 (N + 1,)  where in that file each line begins
train_samples.npy, train_starts.npy, val_...   the packs of each part (see `Packs`)
meta.json        the summary, a hash of ids and trained, and the sizes by which a torn folder is told
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
    """Writes samples into a folder as they come; `finish` adds the plans and makes the folder complete."""

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
        """Adds samples; `origins` says of each where it came from."""
        if not samples:
            return
        ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int32)
        trained = np.concatenate([sample.labels for sample in samples]) != IGNORE_INDEX
        for file, digest, content in zip((self._ids, self._trained), self._digests, (ids, trained), strict=True):
            file.write(content.tobytes())
            digest.update(content.tobytes())
        lines = [f'{_one_line(origin)}\n'.encode('utf-8', 'surrogateescape') for origin in origins]
        self._origins.writelines(lines)
        self._origin_starts.extend(accumulate(map(len, lines), initial=self._origin_starts.pop()))
        self._hashes.extend(map(content_hash, samples))
        ends = np.cumsum([len(sample.input_ids) for sample in samples]) + self._offsets[-1]
        self._offsets.extend(ends.tolist())

    @property
    def num_samples(self) -> int:
        """Samples written so far."""
        return len(self._offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample so far, int64 `(N,)`."""
        return np.diff(np.array(self._offsets, dtype=np.int64))

    @property
    def hashes(self) -> np.ndarray:
        """Hash of each sample's content so far, uint64 `(N,)`."""
        return np.array(self._hashes, dtype=np.uint64)

    def close(self) -> None:
        """Closes the files; the folder stays incomplete without `finish`."""
        self._ids.close()
        self._trained.close()
        self._origins.close()

    def finish(self, parts: dict[str, Packs], summary: Summary) -> None:
        """Writes the plans and, last, what makes the folder complete."""
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


def _one_line(text: str) -> str:
    return text.replace('\n', ' ').replace('\r', ' ')


def _line_at(file: BinaryIO, start: int) -> str:
    file.seek(start)
    return file.readline().decode('utf-8', 'surrogateescape').rstrip('\n')


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds prepared data with every file of the size it was written with."""
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
    """Packs of a prepared folder, read from disk when asked for.

    `dataset[i]` is a dict of `input_ids`, `labels` and `position_ids`, int64 tensors `(S,)`; positions start again at 0
    with each sample of the pack.

    Attributes:
        lengths: Tokens of each pack, int64 `(len(self),)`, known without loading any.
        summary: What became of the records.
        hashes: Hash of the content of each conversation of both parts, by number, uint64 `(N,)`.
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
                f'{self.folder}: prepared data is damaged ({error}); remove this folder, and it is made again'
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
            raise IndexError(f'item {index} of a data set of {len(self)}')
        return join_samples([self.sample(int(number)) for number in self._packs[index % len(self)]])

    def sample(self, number: int) -> Sample:
        """Returns one conversation, whichever pack it is in."""
        start, end = self._offsets[number : number + 2]
        ids = self._ids[start:end].astype(np.int64)
        return Sample(ids, np.where(self._trained[start:end], ids, IGNORE_INDEX))

    @property
    def sample_lengths(self) -> np.ndarray:
        """Tokens of each conversation of both parts, by number, int64 `(N,)`."""
        return np.diff(self._offsets)

    @property
    def sample_numbers(self) -> np.ndarray:
        """The conversations of this part, in the order of the packs, int64 `(N,)`."""
        return np.asarray(self._packs.samples)

    @property
    def num_samples(self) -> int:
        """Conversations of both parts."""
        return len(self._offsets) - 1

    def origins(self, index: int) -> list[str]:
        """Where the conversations of a pack came from, such as 'file:line', in the order of the data."""
        numbers = np.unique(self._packs[index])
        with (self.folder / _ORIGINS).open('rb') as file:
            return [_line_at(file, start) for start in self._origin_starts[numbers].tolist()]

    @property
    def digest(self) -> str:
        """A hash of this part's ids, of what is trained and of the packs: the same wherever the data came from."""
        digest = hashlib.blake2b(self._content.encode(), digest_size=16)
        for part in (self._packs.samples, self._packs.starts, self._offsets):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def packing_efficiency(self, max_length: int) -> float:
        """The share of the tokens that a pack may have, `max_length`, which one has on average."""
        return float(self.lengths.mean() / max_length) if len(self) else 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {'folder': self.folder, 'part': self.part}  # a worker maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state['folder'], state['part'])  # type: ignore[misc]
