"""Data: from conversation files to packs of token ids. `pipeline.prepare_dataset` is the one entry training uses.

The names below are those that classical configs import; they are loaded when they are asked for.
"""

from __future__ import annotations

from typing import Any

_CLASSICAL = ('ConcatDataset', 'MOSSSFTDataset', 'process_hf_dataset', 'process_ms_dataset')


def __getattr__(name: str) -> Any:
    if name in _CLASSICAL:
        from xtuner.dataset import classical

        return getattr(classical, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
