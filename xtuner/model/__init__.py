"""Models, adapters, loss. Classical configs import `SupervisedFinetune` from here; it is loaded when asked for."""

from __future__ import annotations

import logging
from typing import Any

# As it is imported, bitsandbytes advises to install a package for a layout of 4-bit weights that is never used here
# (`quantization.keep_plain_layout`).
logging.getLogger('bitsandbytes.backends.cpu.ops').addFilter(
    lambda record: 'pip install kernels' not in str(record.msg)
)


def __getattr__(name: str) -> Any:
    if name == 'SupervisedFinetune':
        from xtuner.objectives.sft import SupervisedFinetune

        return SupervisedFinetune
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
