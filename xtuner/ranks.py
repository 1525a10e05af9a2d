"""Which process of a run this is, as far as the environment tells: known before torch is imported or a group joined."""

from __future__ import annotations

import os


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the one of rank 0 under torchrun or Slurm."""
    return int(os.environ.get('RANK', os.environ.get('SLURM_PROCID', 0))) == 0
