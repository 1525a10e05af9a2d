"""Readable samples and length histograms: which tokens are trained, and how long conversations are."""

from __future__ import annotations

from typing import Any

import numpy as np

from xtuner.dataset.encode.conversation_encoder import IGNORE_INDEX, Sample
from xtuner.utils.escape import printable

_GREEN, _GREY, _RESET = '\x1b[32m', '\x1b[90m', '\x1b[0m'


def show_sample(sample: Sample, tokenizer: Any, *, color: bool) -> str:
    """Returns a sample's text: trained tokens green and others grey, or trained ones between « and » without color."""
    trained = sample.labels != IGNORE_INDEX
    changes = np.flatnonzero(np.diff(trained)) + 1
    text = ''
    for span, wanted in zip(np.split(sample.input_ids, changes), np.split(trained, changes), strict=True):
        shown = printable(tokenizer.decode(span.tolist(), clean_up_tokenization_spaces=False))
        if color:
            text += f'{_GREEN if wanted[0] else _GREY}{shown}{_RESET}'
        else:
            text += f'«{shown}»' if wanted[0] else shown
    return text


def histogram(lengths: np.ndarray, *, num_bins: int = 10, width: int = 40) -> list[str]:
    """Returns the lines of a histogram of lengths in tokens; both bounds of a bin are inclusive.

    Example: `histogram(np.array([1, 2, 9]), num_bins=2)` gives two lines, `1 - 4` with 2 and `5 - 9` with 1.
    """
    if not len(lengths):
        return ['no conversation']
    counts, edges = np.histogram(lengths, bins=min(num_bins, int(np.ptp(lengths)) + 1))
    digits = len(str(int(edges[-1])))
    lines = []
    lowest = np.ceil(edges).astype(int)
    highest = [*(lowest[1:-1] - 1), int(edges[-1])]
    for low, high, count in zip(lowest, highest, counts, strict=False):
        bar = '█' * round(width * count / counts.max())
        lines.append(f'{low:{digits}} - {high:{digits}} tokens  {count:6}  {bar}'.rstrip())
    return lines
