"""Probe samples of a run, kept in its work folder, on which a merged model is compared with the trained model.

They are not part of a checkpoint, because checkpoints are shared with others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX

PROBE_FILE = 'probe.json'
_MAX_SAMPLES, _MAX_TOKENS = 16, 256
_MAX_BYTES = 2**20  # of a file that is read; files written here have less than 100 KB


@dataclass(frozen=True)
class Probe:
    """Samples as token ids.

    Attributes:
        part: 'validation' or 'training': the part that the samples come from.
        samples: For each sample its ids, int64 (S,), and which of them are trained, bool (S,).
    """

    part: str
    samples: tuple[tuple[Tensor, Tensor], ...]


def write_probe(work_dir: Path, packs: Iterable[Mapping[str, Any]], part: str) -> None:
    """Writes the first samples of a data set, unless the file exists.

    Args:
        work_dir: The run's work folder.
        packs: Dicts of `input_ids`, `labels` and `position_ids`, int64 (S,), positions from 0 in each sample.
        part: 'validation' or 'training'.

    Raises:
        OSError: The file cannot be written.
    """
    path = work_dir / PROBE_FILE
    if path.exists():
        return
    samples: list[dict[str, Any]] = []
    for pack in islice(packs, _MAX_SAMPLES):
        starts = (pack['position_ids'] == 0).nonzero().flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(pack['input_ids'])], strict=True):
            ids, labels = (pack[key][start:stop][:_MAX_TOKENS] for key in ('input_ids', 'labels'))
            trained = (labels != IGNORE_INDEX).int()
            if trained.any() and len(samples) < _MAX_SAMPLES:
                samples.append({'input_ids': ids.tolist(), 'trained': trained.tolist()})
        if len(samples) == _MAX_SAMPLES:
            break
    path.write_text(json.dumps({'part': part, 'samples': samples}) + '\n', encoding='utf-8')


def read_probe(work_dir: Path, vocab_size: int) -> Probe | None:
    """Reads the probe samples of a run; returns None if there are none or the file has another content.

    Args:
        work_dir: The run's work folder.
        vocab_size: Upper bound of the ids.
    """
    path = work_dir / PROBE_FILE
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return None
        content = json.loads(path.read_text(encoding='utf-8'))
        samples = []
        for entry in content['samples'][:_MAX_SAMPLES]:
            ids, trained = torch.tensor(entry['input_ids']), torch.tensor(entry['trained'])
            fits = ids.dim() == 1 and ids.shape == trained.shape and ids.dtype == trained.dtype == torch.int64
            if not fits or not len(ids) or ids.min() < 0 or ids.max() >= vocab_size:
                return None
            samples.append((ids[:_MAX_TOKENS], trained[:_MAX_TOKENS].bool()))
        part = 'validation' if content['part'] == 'validation' else 'training'
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError):
        return None
    return Probe(part, tuple(samples)) if samples else None
