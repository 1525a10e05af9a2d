"""Classical import path of the collate function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.dataset.packing.collate import collate


def default_collate_fn(
    instances: Sequence[Mapping[str, Any]],
    pad_index: int = 0,
    return_hf_format: bool = False,
    use_varlen_attn: bool = False,
) -> dict[str, Any]:
    """Joins items into a batch; see `xtuner.dataset.packing.collate.collate`.

    Args:
        instances: Items of a prepared data set.
        pad_index: The id that pads `input_ids`.
        return_hf_format: Whether to return the batch itself, not `{'data': batch, 'data_samples': None}`.
        use_varlen_attn: No effect: samples in a pack never attend to each other.
    """
    batch = collate(instances, pad_id=pad_index)
    return batch if return_hf_format else {'data': batch, 'data_samples': None}


__all__ = ['default_collate_fn']
